"""Gradients of the MLP weights over calibration batches, for methods that choose once what they train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from sparsegrad.calibration.gradients import check_counts
from sparsegrad.calibration.grams import check_finite
from sparsegrad.calibration.loss import compute_loss
from sparsegrad.distributed import average_
from sparsegrad.methods.base import Context
from sparsegrad.optim.release import refuse_released
from sparsegrad.targets import Linears


def mean_gradients(
    model: nn.Module,
    linears: Linears,
    context: Context,
    steps: int,
    transform: Callable[[str, Tensor], Tensor] = lambda kind, gradient: gradient,
) -> dict[str, Tensor]:
    """The mean over calibration batches of the gradient of each MLP weight.

    The weights themselves do not change, nor do gradients and flags of other parameters. Several processes get the
    mean over the batches of all.

    Args:
        model: the model, with the linears that are to be measured.
        linears: layer kind -> name -> linear.
        context: opens the batches.
        steps: number of batches.
        transform: kind and gradient (out, in) of one batch -> what is averaged, such as its squares.

    Returns:
        Name of the linear -> mean (out, in), in float32.

    Raises:
        UserError: for a weight without gradient, a gradient that is not finite, a batch without loss, or weights whose
            gradients an optimizer releases.
    """
    kinds = {name: kind for kind, found in linears.items() for name in found}
    weights = {name: linear.weight for found in linears.values() for name, linear in found.items()}
    refuse_released(weights.values())
    means: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    with _nothing_else_trains(model, weights.values()):
        for batch in islice(context.batches(), steps):
            loss = compute_loss(model, batch, next(model.parameters()).device)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    continue
                counts[kinds[name]] += 1
                average_([gradient])  # before the transform: the square of a mean is not the mean of the squares
                value = transform(kinds[name], gradient.float()) / steps
                means[name] = means[name].add_(value) if name in means else value
    check_counts(counts, linears, steps)
    for mean in means.values():
        check_finite(mean)
    return means


@contextmanager
def _nothing_else_trains(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside the context, of all parameters only `weights` need gradients; on exit all flags are restored."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(weight) for weight in weights}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
