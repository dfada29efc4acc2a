"""Updates of low-precision weights that do not round away."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad.errors import UserError

UPDATED = (torch.float64, torch.float32, torch.bfloat16)


def check_updated(weight: Tensor, what: str) -> None:
    """Raise `UserError` for a dtype in which small updates are lost."""
    if weight.dtype not in UPDATED:
        raise UserError(
            f"{what} in {weight.dtype} loses small updates: load the model in float32, which autocast multiplies in "
            "half precision all the same, or in bfloat16, which is rounded at random"
        )


def add_stochastic(weight: Tensor, change: Tensor) -> None:
    """Add `change` to `weight` in place; a bfloat16 weight is rounded up or down at random, right on average.

    A bfloat16 number has 8 bits of mantissa: to the nearest, most steps of a fine-tuning round to no change at all.

    Args:
        weight: of any shape and floating dtype.
        change: the same shape, float32 or finer; its generator is torch's own of that device.
    """
    if weight.dtype != torch.bfloat16:
        weight.add_(change.to(weight.dtype))
        return
    bits = (weight.float() + change.float()).view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    weight.copy_(((bits + noise) & -65536).view(torch.float32))  # the upper half of a float32 is a bfloat16
