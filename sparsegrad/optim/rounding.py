"""Updates and weight decay of bfloat16 weights that are not lost to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Odd multipliers of a 32-bit integer hash, as signed numbers: products wrap around.
_SPREAD, _STEP, _MIX = -1640531527, 668265263, (2146121005, -2073254261)


def add_stochastic(weight: Tensor, change: Tensor, source: Tensor) -> None:
    """`add_stochastic_each` for one weight, without a step."""
    add_stochastic_each([weight], change[None], source[None])


def add_stochastic_each(
    weights: Sequence[Tensor], changes: Tensor, sources: Tensor, steps: Sequence[Tensor] | None = None
) -> None:
    """Add changes to weights in place; bfloat16 weights are rounded stochastically, so the expected value is exact.

    A bfloat16 number has 8 significant bits. With rounding to nearest, most steps of fine-tuning would change nothing.
    All weights take part in the same operations: on a GPU, their number makes no difference to the kernel launches.

    Args:
        weights: `count` weights of one shape and floating dtype.
        changes: (count, *shape), float32 or float64.
        sources: (count, ...), the seed of each weight's noise: floats on the same device that differ from step to step,
            such as the kept gradients. torch's generator is not used, because its state differs between processes, so
            that their weights would diverge. With this seed a resumed run repeats the noise, too.
        steps: count of this step of each weight as a scalar tensor, which makes the seed another one in each step. A
            few gradients of a bfloat16 weight have only a few bits, and often the same ones again: with their noise
            repeated, an entry that was rounded down once would be so forever.
    """
    dtype = weights[0].dtype
    if dtype != torch.bfloat16:
        torch._foreach_add_(list(weights), list(changes.to(dtype)))
        return
    bits = (changes.float() + torch.stack(list(weights))).view(torch.int32)
    # A bfloat16 is the upper half of a float32. Adding 16 random bits before truncation rounds up with a probability
    # equal to the truncated fraction.
    bits.add_(_noise(bits, sources, steps)).bitwise_and_(-65536)
    torch._foreach_copy_(list(weights), list(bits.view(torch.float32)))


def decay_(weights: Sequence[Tensor], changes: Tensor, rate: Tensor) -> None:
    """Apply weight decay in place: to the weights themselves, or for bfloat16 weights to `changes`.

    Rounded to nearest, a bfloat16 weight times 1 - 1e-4 is the same weight. So its decay is added to the change, which
    `add_stochastic_each` applies afterwards.

    Args:
        weights: `count` weights of one shape and dtype.
        changes: (count, *shape), float32 or float64: what is added to each weight afterwards.
        rate: lr * weight_decay as a scalar tensor on the weights' device.
    """
    if weights[0].dtype == torch.bfloat16:
        changes.sub_(torch.stack(list(weights)).to(changes.dtype).mul_(rate))
    else:
        torch._foreach_mul_(list(weights), 1 - rate)


def _noise(like: Tensor, sources: Tensor, steps: Sequence[Tensor] | None = None) -> Tensor:
    """16 random bits per entry, of the shape of `like` (count, *shape).

    They are a hash of the position in the weight, all bits of its source, and its step.
    """
    count = len(like)
    keys = sources.detach().float().contiguous().view(torch.int32).view(count, -1).sum(dim=1, dtype=torch.int32)
    if steps is not None:
        keys = keys + torch.stack(list(steps)).to(torch.int32) * _STEP
    mixed = torch.arange(like[0].numel(), dtype=torch.int32, device=like.device).mul_(_SPREAD) + keys[:, None]
    for shift, factor in zip((16, 15), _MIX, strict=True):
        mixed.bitwise_xor_(_shift_right(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shift_right(mixed, 16)).bitwise_and_(0xFFFF).view(like.shape)


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    """Logical right shift of int32: torch's own shift is arithmetic and would copy the sign bit."""
    return bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
