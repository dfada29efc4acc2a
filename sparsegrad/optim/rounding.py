"""Updates and weight decay of bfloat16 weights that are not lost to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Odd multipliers of a 32-bit integer hash, as signed numbers: products wrap around.
_SPREAD, _STEP, _MIX = -1640531527, 668265263, (2146121005, -2073254261)


def add_stochastic(weight: Tensor, change: Tensor, source: Tensor, step: Tensor | None = None) -> None:
    """Add `change` to `weight` in place; bfloat16 weights are rounded stochastically, so the expected value is exact.

    A bfloat16 number has 8 significant bits. With rounding to nearest, most steps of fine-tuning would change nothing.

    Args:
        weight: any shape and floating dtype.
        change: the same shape, float32 or float64.
        source: seed of the noise: floats on the same device that differ from step to step, such as the kept gradients.
            torch's generator is not used, because its state differs between processes, so that their weights would
            diverge. With this seed a resumed run repeats the noise, too.
        step: count of this step as a scalar tensor, which makes the seed another one in each step. A few gradients of a
            bfloat16 weight have only a few bits, and often the same ones again: with their noise repeated, an entry
            that was rounded down once would be so forever.
    """
    if weight.dtype != torch.bfloat16:
        weight.add_(change.to(weight.dtype))
        return
    bits = (weight.float() + change.float()).view(torch.int32)
    # A bfloat16 is the upper half of a float32. Adding 16 random bits before truncation rounds up with a probability
    # equal to the truncated fraction.
    bits = (bits + _noise(bits, source, step)) & -65536
    weight.copy_(bits.view(torch.float32))


def decay_(weights: Sequence[Tensor], changes: Tensor, rate: Tensor) -> None:
    """Apply weight decay in place: to the weights themselves, or for bfloat16 weights to `changes`.

    Rounded to nearest, a bfloat16 weight times 1 - 1e-4 is the same weight. So its decay is added to the change, which
    `add_stochastic` applies afterwards.

    Args:
        weights: `count` weights of one shape.
        changes: (count, *shape), float32 or float64: what is added to each weight afterwards.
        rate: lr * weight_decay as a scalar tensor on the weights' device.
    """
    exact = [weight for weight in weights if weight.dtype != torch.bfloat16]
    if exact:
        torch._foreach_mul_(exact, 1 - rate)
    for weight, change in zip(weights, changes, strict=True):
        if weight.dtype == torch.bfloat16:
            change.sub_(weight.to(change.dtype) * rate)


def _noise(like: Tensor, source: Tensor, step: Tensor | None = None) -> Tensor:
    """16 random bits per entry, of the shape of `like`: a hash of the position, all bits of `source`, and `step`."""
    key = source.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int32)
    if step is not None:
        key = key + step.to(torch.int32) * _STEP
    mixed = torch.arange(like.numel(), dtype=torch.int32, device=like.device).mul_(_SPREAD).add_(key)
    for shift, factor in zip((16, 15), _MIX, strict=True):
        mixed.bitwise_xor_(_shift_right(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shift_right(mixed, 16)).bitwise_and_(0xFFFF).view(like.shape)


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    """Logical right shift of int32: torch's own shift is arithmetic and would copy the sign bit."""
    return bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
