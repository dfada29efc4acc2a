"""Updates of low-precision weights that do not round away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Odd multipliers of the mixing, as signed 32-bit numbers: products wrap around.
_SPREAD, _MIX = -1640531527, (2146121005, -2073254261)


def add_stochastic(weight: Tensor, change: Tensor, source: Tensor) -> None:
    """Add `change` to `weight` in place; a bfloat16 weight is rounded up or down at random, right on average.

    A bfloat16 number has 8 bits of mantissa: to the nearest, most steps of a fine-tuning round to no change at all.

    Args:
        weight: of any shape and floating dtype.
        change: the same shape, float32 or finer.
        source: what the noise is made from: any floats on the same device that differ from step to step, such as the
            kept gradients. Not torch's generator, which several processes have each in another state: their weights
            would part. A continued run repeats the noise too.
    """
    if weight.dtype != torch.bfloat16:
        weight.add_(change.to(weight.dtype))
        return
    bits = (weight.float() + change.float()).view(torch.int32)
    bits = (bits + _noise(bits, source)) & -65536  # the upper half of a float32 is a bfloat16
    weight.copy_(bits.view(torch.float32))


def decay_(weights: Sequence[Tensor], changes: Tensor, rate: Tensor) -> None:
    """Shrink each weight by the share `rate`, in place; a bfloat16 one through its change, for `add_stochastic`.

    To the nearest, a bfloat16 weight times 1 - 1e-4 is the same weight: its decay would be lost.

    Args:
        weights: of one shape.
        changes: (count, *shape), float32 or finer: what is to be added to each weight afterwards.
        rate: one number on their device, such as lr * weight_decay.
    """
    exact = [weight for weight in weights if weight.dtype != torch.bfloat16]
    if exact:
        torch._foreach_mul_(exact, 1 - rate)
    for weight, change in zip(weights, changes, strict=True):
        if weight.dtype == torch.bfloat16:
            change.sub_(weight.to(change.dtype) * rate)


def _noise(like: Tensor, source: Tensor) -> Tensor:
    """Numbers of 16 random bits, of the shape of `like`: a hash of the place and of all bits of `source`."""
    key = source.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int32)
    mixed = torch.arange(like.numel(), dtype=torch.int32, device=like.device).mul_(_SPREAD).add_(key)
    for shift, factor in zip((16, 15), _MIX, strict=True):
        mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shifted(mixed, 16)).bitwise_and_(0xFFFF).view(like.shape)


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """Right shift of 32 bits that brings in zeros; torch's own brings in the sign."""
    return bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
