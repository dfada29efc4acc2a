"""Data-parallel training, as started by `torchrun` or `accelerate launch`: whole weights (DDP) or shards (FSDP2).

With a single process every function here is a no-op.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsegrad.bits import as_integers
from sparsegrad.errors import UserError

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def world_size() -> int:
    """Number of processes that train together, from the launcher's environment; known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The index of this process, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes records and prints."""
    return rank() == 0


def connected() -> bool:
    """Whether there are several processes with an initialized process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place.

    The mean of per-process gradients is the gradient of the batch that the processes share.
    """
    if connected():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())


def disconnect() -> None:
    """Close the connections of this process at the end of a program.

    Otherwise their threads may still run when Python exits, which has aborted a process whose run was complete.
    """
    if connected():
        dist.destroy_process_group()


def copy_main_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the main process's, in place; every process keeps it on its own device."""
    if connected():
        for tensor in tensors:
            found = tensor.contiguous()  # as the collective needs it
            dist.broadcast(found, src=0)
            tensor.copy_(found)


def from_main(make: Callable[[], Value]) -> Value:
    """Call `make` in the main process and return its result in every process.

    The result is sent by pickle: a tensor on a GPU would come to the main process's GPU in every process. For such
    tensors use `copy_main_`.

    Raises:
        UserError: in every process, if `make` raises one.
    """
    if not connected():
        return make()
    outcome: list[tuple[Value | None, UserError | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(make(), None)]
        except UserError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    value, failure = outcome[0]
    if failure is not None:
        raise mark_shared(failure)
    return value  # type: ignore[return-value]


def on_main(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorate `function` to be called in the main process only; every process gets its value, or its `UserError`.

    All processes must call it, with equal arguments. A single process calls the function as it is.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        return from_main(lambda: function(*args, **kwargs))

    return call


def check_same_weights(model: nn.Module) -> None:
    """Raise `UserError` on every process unless all have the same parameters, bit for bit.

    Shards differ by nature and are not compared.
    """
    if not connected():
        return
    # One integer per parameter is exchanged instead of the weights.
    sums: list[dict[str, int]] = [{}] * dist.get_world_size()
    named = {name: parameter for name, parameter in model.named_parameters() if not is_shard(parameter)}
    dist.all_gather_object(sums, {name: _sum_bits(parameter) for name, parameter in named.items()})
    for name in sums[0]:
        if len({own.get(name) for own in sums}) > 1:
            raise mark_shared(
                UserError(
                    f"{name} differs between the processes: make the model with the same seed on each "
                    "(torch.manual_seed), or load the same weights"
                )
            )


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise `UserError` for a model wrapped by FSDP1, whose flat parameters hide the weights."""
    # Recognized by the name of the class: importing it takes long, and a model can have it only if it is imported.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise shards_error(f"{type(model).__name__} is wrapped by FSDP1 and")


def refuse_shards(model: nn.Module) -> None:
    """Raise `UserError` for a model that FSDP or tensor parallelism has sharded."""
    refuse_fsdp1(model)
    if is_managed(model) or any(is_shard(parameter) for parameter in model.parameters()):
        raise shards_error(f"{type(model).__name__} is")


def is_shard(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, as FSDP2's `fully_shard` and tensor parallelism create.

    Recognized by its attribute, without an import of `torch.distributed.tensor`.
    """
    return hasattr(tensor, "device_mesh")


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 shards the parameters of `module`, which it gathers for forward and backward passes."""
    return getattr(module, "_is_fsdp_managed_module", False)


def shards_error(what: str) -> UserError:
    """The error for a sharded tensor or model; `what` is a subject and verb, such as `a weight is`."""
    return UserError(
        f"{what} cut into shards (FSDP, tensor parallelism), which cannot be rotated: train with "
        "DistributedDataParallel, which keeps every weight whole on every process, or shard with FSDP2's fully_shard "
        'and give prepare engine="fast", whose weights are frozen'
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard, gathered from all processes, which must all call this; any other tensor itself."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered, so that every parameter is a shard again.

    After a forward pass without a backward pass the root's parameters stay whole.
    """
    for module in model.modules():
        if is_managed(module) and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def set_up_shards(model: nn.Module) -> None:
    """Let FSDP2 set itself up now instead of in the first forward pass.

    It notes for each unit in what dtype its gradients are reduced, and never for one whose parameters are all frozen
    at that moment, as in a calibration: with mixed precision the training would then fail.
    """
    if is_managed(model) and hasattr(model, "_get_fsdp_state"):
        model._get_fsdp_state()._lazy_init()  # type: ignore[operator]


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Inside the context, the main process's `model` has whole parameters, on the CPU; yields whether this is it.

    All processes must enter it together; only the main process may use the model there, and nobody may call it. The
    parameters are gathered one by one, so that a device never holds more than one of them. Without shards nothing
    changes, and it yields True.
    """
    reshard(model)
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if is_shard(parameter)
    ]
    copies: dict[int, nn.Parameter] = {}  # id of a shard -> its copy: a tied parameter stays one
    for _, _, parameter in shards:
        if id(parameter) not in copies:
            found = whole(parameter.detach())
            kept = found.cpu() if is_main() else found.new_empty(0)  # the other processes keep nothing
            copies[id(parameter)] = nn.Parameter(kept, parameter.requires_grad)
    try:
        for module, name, parameter in shards if is_main() else ():
            module._parameters[name] = copies[id(parameter)]
        yield is_main() or not shards
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter


def from_gathered(model: nn.Module, make: Callable[[], Value]) -> Value:
    """What `make` returns for the whole `model`: called in the main process if the model is sharded; see `gathered`."""
    reshard(model)
    sharded = any(map(is_shard, model.parameters()))
    with gathered(model):
        return from_main(make) if sharded else make()


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model that was compiled, which shares every weight; or `model` itself."""
    return getattr(model, "_orig_mod", model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, without the prefix of its names and without its gradient hooks."""
    inner = unwrap_compiled(model)
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model


def _sum_bits(tensor: Tensor) -> int:
    """A checksum that is equal on every device."""
    return int(as_integers(tensor).sum(dtype=torch.int64))


def mark_shared(error: UserError) -> UserError:
    """Mark an error that all processes raise, so that only the main one prints it."""
    error.silent = not is_main()
    return error
