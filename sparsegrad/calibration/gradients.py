"""Calibration, the paper's preliminary phase: gradients of the MLP weights over some batches, and their HOSVD."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsegrad.arguments import explained
from sparsegrad.basis import SIDES, Basis
from sparsegrad.calibration.buffers import keep_buffers
from sparsegrad.calibration.grams import Grams
from sparsegrad.calibration.inputs import check_batches, check_device, read_linears
from sparsegrad.calibration.loss import NO_REENTRANT, Batch, check_gradients_enabled, compute_loss
from sparsegrad.calibration.plain_linears import lean_gradients
from sparsegrad.distributed import (
    average_,
    check_same_weights,
    connected,
    is_managed,
    is_shard,
    refuse_fsdp1,
    refuse_shards,
    reshard,
    set_up_shards,
    unwrapped,
    whole,
)
from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.optim.release import refuse_released
from sparsegrad.progress import track


class Progress(Protocol):
    """What shows progress, such as `tqdm.auto.tqdm`."""

    def __call__(self, items: Any, /, *, desc: str) -> Iterable[Any]:
        """Yield each of `items`, a sequence, and show how many have been processed and how long the rest takes."""


@explained(dict.fromkeys(("path", "folder"), "give what it returns to save_bases, which writes the file"))
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    mlp: Mapping[str, Mapping[str, nn.Linear] | Iterable[nn.Linear]],
    steps: int = 30,
    *,
    sides: str = "both",
    gram_device: torch.device | str | None = None,
    drop_padding: bool = True,
    update: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Basis]:
    """Collect gradients of the MLP weights over `steps` batches and decompose them (paper, section 3.1).

    During calibration all parameters except the MLP weights are frozen. No weight changes, and no gradient is kept:
    each is added to the Gram matrices of its kind and released as soon as back-propagation has computed it. Flags,
    gradients, the train or eval mode and the state dict, with the statistics of BatchNorm, are the same after the call
    as before.

    All gradients of a kind are stacked. A batch that does not use a weight (LayerDrop, an expert that no token is sent
    to) adds nothing to the stack, as a gradient of zero would: such a weight counts less in the basis, and a warning
    tells the numbers.

    Several connected processes (`torch.distributed`) average each gradient first, so that all get the same basis, that
    of their joint batch. The model may be sharded by FSDP2: each gradient is then gathered for its product, one weight
    at a time.

    Args:
        model: called as `model(**batch)`. The result has a `loss` as attribute or key, or is a tuple whose first item
            is the loss.
        batches: mappings of tensors with labels, under keys that begin with `label`; at least `steps` of them. They are
            read lazily and moved to the model's device.
        mlp: what `find_mlp` returns; or layer kind -> linears, whose weights (out, in) share one basis.
        steps: number of batches (paper: 30).
        sides: `both` (the paper), or only `in`, `out` or `small`, the side with fewer features. Decomposing the longer
            side is most of the cost.
        gram_device: device of the Gram matrices; `cpu` saves GPU memory. None uses the weights' device, or that of the
            first gradient for a model on several devices (`device_map`). For a LLaMA block (4096, 11008) the sums of
            one kind occupy 0.55 GB.
        drop_padding: on a CPU, leave padding out of the gradients, which are the same without it. False: the model is
            called as it is, for losses that are differentiated twice, `torch.func` or nested tensors.
        update: called after each batch, e.g. to take an optimizer step as the authors' code does. The other parameters
            are then not frozen, and the statistics of BatchNorm are not set back.
        progress: called as `progress(items, desc=...)` for the batches, and again for the decompositions; `tqdm` fits,
            and shows the remaining time. None: `sparsegrad.progress.track`, which `sparsegrad.progress.silence()` or
            `SPARSEGRAD_QUIET=1` in the environment turns off.

    Returns:
        Layer kind -> `Basis`, in the weights' dtype (float32 for lower precisions) and on the model's device.

    Raises:
        UserError: inside `torch.no_grad()`; for names instead of linears, too few batches, a batch without loss, a
            weight that gets no gradient (with several processes: not from every batch) or several of one batch, a
            gradient that is not finite, a model sharded by FSDP1 or tensor parallelism, a model that differs between
            processes, a device that does not exist, or weights whose gradients an optimizer releases.
    """
    progress = progress or track
    check_integer("steps", steps, at_least=1, remedy="the paper uses 30")
    check_choice("sides", sides, SIDES)
    check_choice("drop_padding", drop_padding, (True, False))
    check_gradients_enabled()
    check_device(gram_device)
    found, source = read_linears(mlp), take_batches(batches, steps)
    model = unwrapped(model)
    _prepare_shards(model)
    check_same_weights(model)
    weights = {kind: [linear.weight for linear in linears] for kind, linears in found.items()}
    refuse_released(weight for group in weights.values() for weight in group)
    grams = {kind: Grams(sides=sides, device=gram_device) for kind in weights}
    device = next(model.parameters()).device
    names = _names_of(model, weights)
    counts = dict.fromkeys(names, 0)
    kept = keep_buffers(model) if update is None else nullcontext()
    with (
        kept,
        lean_gradients(found, drop_padding),
        _without_hooks(model),
        _collect_gradients(model, weights, grams, counts, freeze=update is None),
    ):
        for _ in progress(range(steps), desc="calibration"):
            compute_loss(model, next(source), device).backward()  # type: ignore[no-untyped-call]
            if update is not None:
                average_(_other_gradients(model, weights))
                update()
    check_counts({names[weight]: count for weight, count in counts.items()}, steps)
    # `pop` frees the sums of a kind before the next is decomposed.
    return {kind: grams.pop(kind).basis().to(device) for kind in progress(list(grams), desc="decomposition")}


def take_batches(batches: Iterable[Batch], steps: int, name: str = "steps") -> Iterator[Batch]:
    """The first `steps` of `batches`, read lazily.

    Args:
        batches: at least `steps` of them.
        steps: their number.
        name: of the argument that sets `steps` in the function that the user called.

    Raises:
        UserError: at once for what is not several batches; later, when there are fewer, with their number.
    """
    check_batches(batches, name)
    return _count_batches(batches, steps, name)


def _count_batches(batches: Iterable[Batch], steps: int, name: str) -> Iterator[Batch]:
    count = 0
    for batch in islice(batches, steps):
        yield batch
        count += 1
    if not count:
        raise UserError(f"batches is empty, but calibration needs {name}={steps}: give a list or a DataLoader")
    if count < steps:
        raise UserError(
            f"calibration ran out of batches at {count} of {steps}: give more batches, or set {name}={count}"
        )


def _prepare_shards(model: nn.Module) -> None:
    """Bring a model that FSDP2 shards into its initial state, and refuse any other sharding."""
    reshard(model)
    set_up_shards(model)
    refuse_fsdp1(model)
    if not is_managed(model):
        refuse_shards(model)  # of tensor parallelism


def check_counts(counts: Mapping[str, int], steps: int) -> None:
    """Raise `UserError` for a weight with no gradient or more than `steps`, and warn of those with fewer.

    Args:
        counts: name of each weight -> number of its gradients.
        steps: number of batches.
    """
    if all(count == steps for count in counts.values()):
        return
    most = max(counts, key=counts.__getitem__)
    if counts[most] > steps:
        raise UserError(
            f"calibration got {counts[most]} gradients of {most} from {steps} batches, which are parts of the true "
            "ones: checkpoint with use_reentrant=False, or without checkpointing, where a layer is used several times"
        )
    fewest = min(counts, key=counts.__getitem__)
    if not counts[fewest]:
        raise UserError(
            f"calibration got no gradient of {fewest} from {steps} batches: name only linears that the model's forward "
            f"pass uses, or give more batches if it uses some of them in few batches only; {NO_REENTRANT}"
        )
    fewer = sum(count < steps for count in counts.values())
    found = (
        f"calibration got fewer gradients than batches ({steps}) of {fewer} of {len(counts)} weights, the fewest "
        f"({counts[fewest]}) of {fewest}"
    )
    remedy = "if layers are dropped at random (LayerDrop), model.eval() before the calibration uses all of them"
    if connected():  # which average the gradients of a weight: those of different batches would be mixed up
        raise UserError(f"{found}, but several processes need all: calibrate in one process; or, {remedy}")
    warnings.warn(f"{found}: those weights count less in the basis of their kind; {remedy}", stacklevel=3)


def _names_of(model: nn.Module, weights: Mapping[str, list[Tensor]]) -> dict[int, str]:
    """Identity of each weight -> its name in the model; a weight of no model is named by its kind and number."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        id(weight): names.get(id(weight), f"{kind} {number}")
        for kind, group in weights.items()
        for number, weight in enumerate(group)
    }


@contextmanager
def only_trains(model: nn.Module, weights: Iterable[Tensor], *, others: bool = False) -> Iterator[None]:
    """Inside the context, only `weights` need gradients, and no parameter has one; afterwards all is as before.

    Freezing the rest saves its weight gradients: back-propagation then computes only what is asked for. (A reentrant
    checkpoint whose inputs then need no gradient has none either.) With `others` the other parameters keep their flags.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(weight) for weight in weights}
    try:
        for parameter, flag, _ in before:
            parameter.requires_grad_(id(parameter) in wanted or (flag and others))
            parameter.grad = None
        yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def _collect_gradients(
    model: nn.Module,
    weights: dict[str, list[Tensor]],
    grams: dict[str, Grams],
    counts: dict[int, int],
    freeze: bool,
) -> Iterator[None]:
    """Inside the context, gradients of `weights` are added to `grams`, and counted by the identity of the weight."""
    # The hooks run during back-propagation, so that the gradients of all weights never exist at the same time.
    hooks = [
        weight.register_post_accumulate_grad_hook(_make_hook(grams[kind], counts, id(weight), freeze))  # type: ignore[no-untyped-call]
        for kind, group in weights.items()
        for weight in group
    ]
    try:
        with only_trains(model, (weight for group in weights.values() for weight in group), others=not freeze):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within: no hook runs when a gradient is complete, such as the step of an optimizer in the backward pass."""
    found = [own for parameter in model.parameters() if (own := parameter._post_accumulate_grad_hooks)]
    kept = [(own, dict(own)) for own in found]
    try:
        for own in found:
            own.clear()
        yield
    finally:
        for own, before in kept:
            own.update(before)


def _make_hook(sums: Grams, counts: dict[int, int], key: int, release: bool) -> Callable[[Tensor], None]:
    """A hook that adds a weight's gradient (out, in) to `sums`, counts it, and frees it if `release`."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        # Before the product: the Gram matrix of a mean is not the mean of the Gram matrices. FSDP2 calls the hook with
        # a shard of the mean; every process passes this line for the same weight, so they gather the same gradient.
        if not is_shard(weight.grad):
            average_([weight.grad])
        sums.add(whole(weight.grad))
        counts[key] += 1
        if release:
            weight.grad = None

    return hook


def _other_gradients(model: nn.Module, weights: Mapping[str, list[Tensor]]) -> Iterator[Tensor]:
    """Gradients of all parameters except `weights`: the hooks have averaged those already."""
    wanted = {id(weight) for group in weights.values() for weight in group}
    found = (p.grad for p in model.parameters() if p.grad is not None and id(p) not in wanted)
    return (gradient for gradient in found if not is_shard(gradient))  # FSDP2 has averaged those
