"""Engine `block`: not exact. The kept entries are one fixed leading block of the rotated gradient, not its top-k.

HOSVD sorts directions by energy, so the leading r inputs and c outputs hold much of the gradient. If only the block
of the rotated gradient at their crossing is wanted, it never has to be rotated as a whole: with U_r (in, r) and
V_c (out, c)

    core gradient = (dy V_c)^T (x U_r)    (c, r)

costs at most T (n r + m c + r c) multiplications instead of T n m, and back-propagation needs x U_r (T, r) instead of
x (T, n). Where c is large, V_c^T (dy^T x U_r) is the same for T m r + m r c: then r alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, check_integer
from sparsegrad.layers.common import check_linear, product_dtype
from sparsegrad.optim.rounding import add_stochastic
from sparsegrad.optim.selection import check_density
from sparsegrad.targets import check_updated


class _BlockLinear(torch.autograd.Function):
    """y = x W^T + b with gradients for x, b, and the core: W holds V_c core U_r^T already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, core: Tensor, U_r: Tensor, V_c: Tensor) -> Tensor:
        ctx.save_for_backward(x @ U_r if ctx.needs_input_grad[3] else None, W, V_c)
        ctx.core_dtype = core.dtype
        return nn.functional.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x_r, W, V_c) = grads, ctx.saved_tensors
        dx = dy @ W if ctx.needs_input_grad[0] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        dcore = _core_gradient(dy, x_r, V_c).to(ctx.core_dtype) if ctx.needs_input_grad[3] else None
        return dx, None, db, dcore, None, None


def _core_gradient(dy: Tensor, x_r: Tensor, V_c: Tensor) -> Tensor:
    """V_c^T dy^T x_r (c, r) from dy (T, out) and x U_r (T, r), in the order that multiplies less."""
    (T, r), (m, c) = x_r.shape, V_c.shape
    return V_c.T @ (dy.T @ x_r) if m * r * (T + c) < T * c * (m + r) else (dy @ V_c).T @ x_r


class BlockLinear(nn.Module):
    """A linear whose weight is W + V_c core U_r^T, of which the core (c, r) trains.

    The core is an ordinary parameter: accumulation, clipping, AMP and optimizers work as ever. Its change is merged
    into W before the next forward pass, so that a pass costs one product; W itself has no gradient. A change is seen by
    torch's count of in-place writes. Writes through `.data`, and those of torch's fused optimizers, are not counted:
    after a fused step call `torch.autograd.graph.increment_version` on the cores, as `SparseGradAdamW` and
    `methods.base.adamw` do.

    Args:
        weight: W (out, in), merged in place.
        bias: (out,) or None.
        basis: its leading columns are used; it needs both sides.
        core_shape: (c, r), at most (out, in).

    Raises:
        UserError: for a basis of another shape or of one side, a core larger than the weight, or a weight in float16.
    """

    merged: Tensor
    in_basis: Tensor
    out_basis: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, basis: Basis, core_shape: tuple[int, int]) -> None:
        super().__init__()
        if not basis.fits(weight.shape):
            raise UserError(
                f"a basis for {basis.shape} does not fit a linear of {tuple(weight.shape)}: calibrate it anew"
            )
        check_updated(weight, "the weight of a block")
        for name, size, most in zip(("out", "in"), core_shape, weight.shape, strict=True):
            check_integer(f"{name} directions", size, at_least=1, at_most=most)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias)
        # In float32 at least, whatever the weight's dtype: small changes of the core must not round away.
        core = torch.zeros(core_shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.core = nn.Parameter(core)
        self.register_buffer("merged", core.clone())
        U, V = basis.to(weight.device, weight.dtype).both()
        self.register_buffer("in_basis", U[:, : core_shape[1]].contiguous(), persistent=False)
        self.register_buffer("out_basis", V[:, : core_shape[0]].contiguous(), persistent=False)
        self._merged_version = self.core._version

    @classmethod
    def from_linear(cls, linear: nn.Linear, basis: Basis, core_shape: tuple[int, int]) -> BlockLinear:
        """Take over a linear (out, in); its own weight is left alone.

        Raises:
            UserError: also for what is no `nn.Linear`, such as GPT-2's `Conv1D`.
        """
        check_linear(linear, "a block")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(linear.weight.detach().clone(), bias, basis, core_shape)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The ordinary linear with the same function."""
        self.merge()
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())  # type: ignore[assignment]
        return linear

    @torch.no_grad()
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def merge(self) -> None:
        """Bring what the core has changed since the last merge into W."""
        if self.core._version == self._merged_version:  # counts in-place writes: no look at the values, no sync
            return
        change = self.core - self.merged  # (c, r)
        left, right = self._factors(change)  # (out, k) and (k, in), k the shorter side of the core
        if self.weight.dtype == torch.bfloat16:
            add_stochastic(self.weight, left @ right, self.core)
        else:
            self.weight.addmm_(left.to(self.weight.dtype), right.to(self.weight.dtype))
        self.merged.copy_(self.core)
        self._merged_version = self.core._version

    def _factors(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """V_c change U_r^T as a product of two; the longer side of the core (c, r) is multiplied first."""
        right = self.in_basis.to(change.dtype).T
        V_c = self.out_basis.to(change.dtype)
        return (V_c, change @ right) if change.shape[0] < change.shape[1] else (V_c @ change, right)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products run in its dtype, as `nn.Linear`'s do."""
        self.merge()
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            W, U_r = self.weight.to(dtype), self.in_basis.to(dtype)
            V_c = self.out_basis.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            y = _BlockLinear.apply(tokens, W, bias, self.core, U_r, V_c)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._merged_version = -1  # a copy counts its writes anew, and may have been made between a step and its merge

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in={in_features}, out={out_features}, core={tuple(self.core.shape)}"


def share_bases(layers: Sequence[BlockLinear]) -> None:
    """Let layers that were made from one basis with one core shape read the same two matrices: one copy for all."""
    for layer in layers[1:]:
        layer.in_basis, layer.out_basis = layers[0].in_basis, layers[0].out_basis


def core_shape(shape: tuple[int, int], density: float) -> tuple[int, int]:
    """The block (c, r) of a weight (out, in) that has `density` of its entries: the same share of either side.

    Raises:
        UserError: for a density outside (0, 1].
    """
    check_density(density)
    rows, columns = (max(1, round(density**0.5 * size)) for size in shape)
    return rows, columns
