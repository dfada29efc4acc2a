"""What the layers of this package share: checks, rules for their products, and the shape of a core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError
from sparsegrad.optim.selection import check_density


class FixedParameter(nn.Parameter):
    """A parameter that never trains, not even if someone unfreezes the whole model.

    Made of a `DTensor` it is an ordinary parameter, which does not train until it is unfrozen.
    """

    requires_grad = property(lambda self: False, lambda self, value: None)

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> FixedParameter:
        """`requires_grad` has no effect: Accelerate gives it to whatever class of parameter it moves."""
        return super().__new__(cls, data.detach(), requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> FixedParameter:
        """Without effect."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedParameter:
        if id(self) not in memo:
            memo[id(self)] = FixedParameter(self.data.clone(memory_format=torch.preserve_format))
        found: FixedParameter = memo[id(self)]
        return found


def keep_fixed(module: nn.Module, name: str) -> None:
    """Let a parameter be a `FixedParameter` again, where torch or pickle has put an ordinary one in its place."""
    parameter = module._parameters.get(name)
    if type(parameter) is nn.Parameter:
        parameter.requires_grad_(False).__class__ = FixedParameter


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


def check_fit(basis: Basis, weight: Tensor) -> None:
    """Raise `UserError` for a basis of another shape than the weight (out, in)."""
    if not basis.fits(weight.shape):
        raise UserError(f"a basis for {basis.shape} does not fit a linear of {tuple(weight.shape)}: calibrate it again")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `nn.Linear`'s product for input `x`: that of autocast if it is enabled, otherwise that of `x`."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves as it is
    return torch.get_autocast_dtype(device) if casts else x.dtype


def check_input(x: Tensor, weight: Tensor, bias: Tensor | None, remedy: str) -> None:
    """Raise what `nn.Linear` raises for dtypes that differ, as autocast does not cast integers and float64.

    Raises:
        UserError: for a nested tensor, whose tokens these layers do not find.
        RuntimeError: of torch, for dtypes that differ.
    """
    if x.is_nested:
        raise UserError(
            f"nested tensors do not work with the layers of this engine: give padded tokens, or all of them in one row "
            f"(values()); or {remedy}"
        )
    dtypes = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    casts = torch.is_autocast_enabled(x.device.type) and all(map(_autocast_casts, dtypes))
    if len(dtypes) > 1 and not casts:
        nn.functional.linear(x, weight, bias)


def _autocast_casts(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


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
    """Raise `UserError` within a transform of `torch.func` or a level of forward-mode gradients.

    They need the parts of a gradient that these layers skip. Without a gradient, under `torch.no_grad`, the layers do
    not call this.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            f"torch.func (vmap, grad, jvp), as for gradients per sample, does not work with the layers of this engine: "
            f"{remedy}"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        raise UserError(f"forward-mode gradients (dual_level) do not work with the layers of this engine: {remedy}")


@contextmanager
def explained_batches(remedy: str) -> Iterator[None]:
    """Within: torch's error for the gradients of several outputs at once becomes a `UserError` with `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule" not in str(error):
            raise
        what = "batched gradients (is_grads_batched=True, jacobian(..., vectorize=True))"
        raise UserError(f"{what} do not work with the layers of this engine: {remedy}") from None


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
