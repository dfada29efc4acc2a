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


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that has these very parameters (out, in) and (out,)."""
    # On `meta`, so that no weight is allocated and initialized just to be replaced.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `nn.Linear`'s product for input `x`: that of autocast if it is enabled, otherwise that of `x`."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves as it is
    return torch.get_autocast_dtype(device) if casts else x.dtype


def refuse_second_order(remedy: str) -> None:
    """Raise `UserError` in a backward pass that autograd records to differentiate it again.

    These layers give `weight.grad` (or the core) another meaning than autograd, which would add its own gradient of the
    second order to it. Compiled code cannot be asked; torch refuses second orders there itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError(
            f"create_graph=True, as for a penalty on gradients, does not work with the layers of this engine: {remedy}"
        )


def refuse_transforms(remedy: str) -> None:
    """Raise `UserError` within a transform of `torch.func`, which needs the parts of a gradient that these layers skip.

    Without a gradient, under `torch.no_grad`, the layers do not call this.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UserError(
            f"torch.func (vmap, grad, jvp), as for gradients per sample, does not work with the layers of this engine: "
            f"{remedy}"
        )


def core_gradient(dy: Tensor, x_r: Tensor, V_c: Tensor) -> Tensor:
    """V_c^T dy^T x_r (c, r) from dy (T, out) and x_r (T, r), in the order with fewer multiplications."""
    (T, r), (m, c) = x_r.shape, V_c.shape
    return V_c.T @ (dy.T @ x_r) if m * r * (T + c) < T * c * (m + r) else (dy @ V_c).T @ x_r


def factor_change(change: Tensor, U_r: Tensor, V_c: Tensor) -> tuple[Tensor, Tensor]:
    """V_c change U_r^T as a product of two matrices; the longer side of the core (c, r) is multiplied first."""
    right, left = U_r.to(change.dtype).T, V_c.to(change.dtype)
    return (left, change @ right) if change.shape[0] < change.shape[1] else (left @ change, right)


def core_shape(shape: tuple[int, int], density: float) -> tuple[int, int]:
    """The core shape (c, r) with the share `density` of the entries of a weight (out, in): sqrt(density) of each side.

    Raises:
        UserError: for a density outside (0, 1].
    """
    check_density(density)
    rows, columns = (max(1, round(density**0.5 * size)) for size in shape)
    return rows, columns
