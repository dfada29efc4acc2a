"""What every layer of this package asks of the linear that it replaces, and of the dtype that it multiplies in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError


def check_linear(linear: nn.Module, what: str, remedy: str = "use engine exact") -> None:
    """Raise `UserError` for what is no `nn.Linear`: GPT-2's `Conv1D` has a weight (in, out)."""
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{what} wraps nn.Linear, not {type(linear).__name__}: {remedy}")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `nn.Linear` would multiply in: autocast's where it is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
