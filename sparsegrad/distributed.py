"""Data-parallel training, as started by `torchrun` or `accelerate launch`.

With a single process every function here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sparsegrad.errors import UserError


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


def check_same_weights(model: nn.Module) -> None:
    """Raise `UserError` on every process unless all have the same parameters, bit for bit."""
    if not connected():
        return
    # One integer per parameter is exchanged instead of the weights.
    sums: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(sums, {name: _sum_bits(parameter) for name, parameter in model.named_parameters()})
    for name in sums[0]:
        if len({own.get(name) for own in sums}) > 1:
            raise _shared(
                UserError(
                    f"{name} differs between the processes: make the model with the same seed on each "
                    "(torch.manual_seed), or load the same weights"
                )
            )


def refuse_shards(model: nn.Module) -> None:
    """Raise `UserError` for a model that FSDP has sharded: no process holds a whole weight to rotate."""
    # FSDP1 wraps modules, recognized by the name of their class; FSDP2 replaces parameters.
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if wrapped or any(is_shard(parameter) for parameter in model.parameters()):
        raise shards_error(f"{type(model).__name__} is")


def is_shard(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, as FSDP2's `fully_shard` and tensor parallelism create.

    Recognized by its attribute, without an import of `torch.distributed.tensor`.
    """
    return hasattr(tensor, "device_mesh")


def shards_error(what: str) -> UserError:
    """The error for a sharded tensor or model; `what` is a subject and verb, such as `a weight is`."""
    return UserError(
        f"{what} cut into shards (FSDP, tensor parallelism), which cannot be rotated: train with "
        "DistributedDataParallel, which keeps every weight whole on every process"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, without the prefix of its names and without its gradient hooks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _sum_bits(tensor: Tensor) -> int:
    """A checksum that is equal on every device: integer addition, unlike float addition, is associative."""
    # The bits are read as integers of the same size, so that NaN and -0.0 are compared too.
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64))


def _shared(error: UserError) -> UserError:
    """Mark an error that all processes raise, so that only the main one prints it."""
    error.silent = not is_main()
    return error
