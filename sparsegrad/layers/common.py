"""What all layers of this package share: the check of the linear they replace, and the dtype of their products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError


def check_linear(linear: nn.Module, what: str, remedy: str = "use engine exact") -> None:
    """Raise `UserError` for a module that is not an `nn.Linear`, such as GPT-2's `Conv1D` with its weight (in, out)."""
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{what} wraps nn.Linear, not {type(linear).__name__}: {remedy}")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `nn.Linear`'s product for input `x`: that of autocast if it is enabled, otherwise that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
