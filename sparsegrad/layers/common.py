"""What the layers of this package share: checks, rules for their products, and the shape of a core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError
from sparsegrad.optim.selection import check_density


def check_linear(linear: nn.Module, what: str, remedy: str = "use engine exact") -> None:
    """Raise `UserError` for a module that is not an `nn.Linear`, such as GPT-2's `Conv1D` with its weight (in, out)."""
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{what} wraps nn.Linear, not {type(linear).__name__}: {remedy}")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `nn.Linear`'s product for input `x`: that of autocast if it is enabled, otherwise that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def refuse_second_order(remedy: str) -> None:
    """Raise `UserError` in a backward pass that autograd records to differentiate it again.

    These layers give `weight.grad` (or the core) another meaning than autograd, which would add its own gradient of the
    second order to it. Compiled code cannot be asked; torch refuses second orders there itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError(
            f"create_graph=True, as for a penalty on gradients, does not work with the layers of this engine: {remedy}"
        )


def core_shape(shape: tuple[int, int], density: float) -> tuple[int, int]:
    """The core shape (c, r) with the share `density` of the entries of a weight (out, in): sqrt(density) of each side.

    Raises:
        UserError: for a density outside (0, 1].
    """
    check_density(density)
    rows, columns = (max(1, round(density**0.5 * size)) for size in shape)
    return rows, columns
