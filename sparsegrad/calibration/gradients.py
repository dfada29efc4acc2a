"""Calibration, the paper's preliminary phase: gradients of the MLP weights over some batches, HOSVD per layer kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import SIDES, Basis
from sparsegrad.calibration.grams import Grams
from sparsegrad.distributed import average_, check_same_weights, refuse_shards, unwrapped
from sparsegrad.errors import UserError, check_choice, check_integer, first_line

Batch = Mapping[str, Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    mlp: Mapping[str, Iterable[nn.Linear]],
    steps: int = 30,
    *,
    sides: str = "both",
    gram_device: torch.device | str | None = None,
    update: Callable[[], None] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Basis]:
    """Collect gradients of the MLP weights over `steps` batches and decompose them (paper, section 3.1).

    All parameters but the MLP weights are frozen meanwhile, no weight changes, and no gradient is kept: each is added
    to its kind's Grams and released as soon as back-propagation has made it. Flags, gradients and the train or eval
    mode are as before when the call returns. Several connected processes (`torch.distributed`) average each gradient
    over their batches first, so that all get the basis of the batch they share.

    Args:
        model: called as `model(**batch)`; the result has a `loss`, as attribute or key, or is a tuple that begins
            with it.
        batches: mappings of tensors with labels; at least `steps` of them, read lazily, moved to the model's device.
        mlp: layer kind -> linears whose weights (out, in) share one basis.
        steps: number of batches (paper: 30).
        sides: `both` (the paper), or only `in`, `out` or `small`, the side with fewer features; the longer
            side's decomposition is most of the cost.
        gram_device: where the sums are kept, `cpu` to spare a GPU's memory; None: on the weights' device, of a model
            on several (`device_map`) that of the first gradient. For a LLaMA block (4096, 11008) the sums of one kind
            take 0.55 GB.
        update: called after each batch instead of freezing the rest: the authors' code trains meanwhile.
        progress: wraps the iterator of steps, e.g. `tqdm`.

    Returns:
        Layer kind -> `Basis`, in the weights' dtype (float32 for lower precisions), on their device.

    Raises:
        UserError: for too few batches, a batch without loss, a weight without gradient, or a gradient not finite; for
            a sharded model, or one that differs between the processes; for a device that does not exist.
    """
    check_integer("steps", steps, at_least=1, remedy="the paper takes 30")
    check_choice("sides", sides, SIDES)
    _check_device(gram_device)
    model = unwrapped(model)
    refuse_shards(model)
    check_same_weights(model)
    weights = {kind: [linear.weight for linear in linears] for kind, linears in mlp.items()}
    grams = {kind: Grams(sides=sides, device=gram_device) for kind in weights}
    device = next(model.parameters()).device
    with _collecting(model, weights, grams, freeze=update is None):
        source = iter(batches)
        for step in progress(range(steps)):
            _loss(model, _next_batch(source, step, steps), device).backward()  # type: ignore[no-untyped-call]
            if update is not None:
                average_(_outside(model, weights))
                update()
    for kind, sums in grams.items():
        if sums.count != steps * len(weights[kind]):
            raise UserError(
                f"calibration got {sums.count} gradients of kind {kind}, not {steps} per weight: is it in use?"
            )
    return {kind: grams.pop(kind).basis().to(device) for kind in list(grams)}  # each kind's sums go with its basis


def _check_device(device: torch.device | str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # what an unknown, an absent or no device gives
        raise UserError(
            f"gram_device={device} cannot be used ({first_line(error)}): give cpu, or None for the weights'"
        ) from None


@contextmanager
def _collecting(
    model: nn.Module, weights: dict[str, list[Tensor]], grams: dict[str, Grams], freeze: bool
) -> Iterator[None]:
    """Within: gradients of `weights` flow into `grams`; afterwards flags, gradients and hooks are as before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(weight) for group in weights.values() for weight in group}
    hooks = []
    for kind, group in weights.items():
        hooks += [weight.register_post_accumulate_grad_hook(_collector(grams[kind], freeze)) for weight in group]  # type: ignore[no-untyped-call]
    try:
        for parameter, flag, _ in before:
            parameter.requires_grad_(id(parameter) in wanted or (flag and not freeze))
            parameter.grad = None
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _collector(sums: Grams, release: bool) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        average_([weight.grad])
        sums.add(weight.grad)
        if release:
            weight.grad = None

    return hook


def _outside(model: nn.Module, weights: Mapping[str, list[Tensor]]) -> Iterator[Tensor]:
    """Gradients of all parameters but `weights`, whose hooks have averaged theirs."""
    wanted = {id(weight) for group in weights.values() for weight in group}
    return (p.grad for p in model.parameters() if p.grad is not None and id(p) not in wanted)


def _next_batch(source: Iterator[Batch], step: int, steps: int) -> Batch:
    try:
        return next(source)
    except StopIteration:
        raise UserError(f"calibration ran out of batches at {step} of {steps}: give more, or fewer steps") from None


def _loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    if not isinstance(batch, Mapping):
        raise UserError(f"a calibration batch is a {type(batch).__name__}: give mappings that model(**batch) takes")
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise UserError(
            f"a calibration batch of {', '.join(map(str, batch))} holds no tensor: give tensors, as a DataLoader or "
            'a tokenizer with return_tensors="pt" makes them'
        )
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    output, labelled = model(**moved), any(name.startswith("label") for name in moved)
    loss = _loss_in(output, labelled)
    if loss is None:
        remedy = "return it as attribute, as key, or first of a tuple" if labelled else "give batches with labels"
        raise UserError(f"the model gives no loss for a batch of {', '.join(moved)}: {remedy}; {_told(output)} came")
    if loss.numel() != 1 or not loss.requires_grad:
        raise UserError(
            f"the model's loss {tuple(loss.shape)} cannot be differentiated: give one number with gradients"
        )
    return loss


def _loss_in(output: Any, labelled: bool) -> Tensor | None:
    """The loss where the Trainer looks for it. A tuple begins with it only if the model was given labels."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        found = output[0] if labelled and output else None
    else:
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def _told(output: Any) -> str:
    """What a model returned, in a few words."""
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in output) or 'nothing'}"
    return f"a {type(output).__name__}"
