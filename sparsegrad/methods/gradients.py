"""Gradients of the MLP weights over calibration batches, for methods that choose once what they train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsegrad.calibration.gradients import check_counts, only_trains
from sparsegrad.calibration.grams import check_finite
from sparsegrad.calibration.loss import compute_loss
from sparsegrad.distributed import average_
from sparsegrad.methods.base import Context
from sparsegrad.optim.release import refuse_released
from sparsegrad.progress import track
from sparsegrad.targets import Linears


def mean_gradients(
    model: nn.Module,
    linears: Linears,
    context: Context,
    steps: int,
    transform: Callable[[str, Tensor], Tensor] = lambda kind, gradient: gradient,
) -> dict[str, Tensor]:
    """The mean over calibration batches of the gradient of each MLP weight; zero where a batch does not use it.

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
        UserError: for a weight without any gradient, a gradient that is not finite, a batch without loss, or weights
            whose gradients an optimizer releases.
    """
    kinds = {name: kind for kind, found in linears.items() for name in found}
    weights = {name: linear.weight for found in linears.values() for name, linear in found.items()}
    refuse_released(weights.values())
    means: dict[str, Tensor] = {}
    counts = dict.fromkeys(weights, 0)
    with only_trains(model, weights.values()):
        for _, batch in zip(track(range(steps), desc="calibration"), context.batches(), strict=False):
            loss = compute_loss(model, batch, next(model.parameters()).device)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    continue
                counts[name] += 1
                average_([gradient])  # before the transform: the square of a mean is not the mean of the squares
                value = transform(kinds[name], gradient.float()) / steps
                means[name] = means[name].add_(value) if name in means else value
    check_counts({f"{name}.weight": count for name, count in counts.items()}, steps)
    for mean in means.values():
        check_finite(mean)
    return means
