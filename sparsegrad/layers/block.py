"""The layer of engine `fast`: it trains one fixed leading block of the rotated gradient, not its largest entries.

This is not the exact method. HOSVD sorts directions by energy, so the leading r input and c output directions hold much
of the gradient. Their block of the rotated gradient can be computed without rotating the whole gradient. With the
leading columns U_r (n, r) and V_c (m, c) of the bases of a linear with n inputs and m outputs,

    core gradient = (dy V_c)^T (x U_r)    (c, r)

takes at most T (n r + m c + r c) multiplications for T tokens, instead of T n m. Back-propagation stores x U_r (T, r)
instead of x (T, n). If c is large, V_c^T (dy^T (x U_r)) gives the same with T m r + m r c multiplications, a cost that
only r keeps small.
"""

from __future__ import annotations

import functools
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
    """y = x W^T + b with gradients for x, b and the core. W (out, in) already includes V_c core U_r^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, core: Tensor, U_r: Tensor, V_c: Tensor) -> Tensor:
        # x (T, in) itself is not saved: its gradient needs only W, and that of the core only x U_r (T, r).
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
    """V_c^T dy^T x_r (c, r) from dy (T, out) and x_r (T, r), in the order with fewer multiplications."""
    (T, r), (m, c) = x_r.shape, V_c.shape
    return V_c.T @ (dy.T @ x_r) if m * r * (T + c) < T * c * (m + r) else (dy @ V_c).T @ x_r


class BlockLinear(nn.Module):
    """A linear whose weight is W + V_c core U_r^T, of which only the core (c, r) trains.

    The core is an ordinary parameter, so gradient accumulation, clipping, AMP and any optimizer work as usual. Its
    change is merged into W before the next forward pass, which then costs one product. W itself has no gradient.

    The layer detects a change of the core by torch's version counter of in-place writes. Writes through `.data` and
    those of torch's fused optimizers do not increment it: after a fused step call
    `torch.autograd.graph.increment_version` on the cores, as `SparseGradAdamW` and `methods.base.adamw` do.

    Args:
        weight: W (out, in); the layer keeps it and changes it in place.
        bias: (out,) or None.
        basis: basis of both sides, of which the leading columns are used.
        core_shape: (c, r), at most (out, in).

    Raises:
        UserError: for a basis of another shape or of one side, a core larger than the weight, or a weight in float16.
    """

    merged: Tensor
    in_basis: Tensor
    out_basis: Tensor
    _cast: tuple[tuple[Any, ...], Tensor] | None = None  # state of W, and W in another dtype

    def __init__(self, weight: Tensor, bias: Tensor | None, basis: Basis, core_shape: tuple[int, int]) -> None:
        super().__init__()
        _keep_out_of_compiler()
        if not basis.fits(weight.shape):
            raise UserError(
                f"a basis for {basis.shape} does not fit a linear of {tuple(weight.shape)}: calibrate it again"
            )
        check_updated(weight, "the weight of a block")
        for name, size, most in zip(("out", "in"), core_shape, weight.shape, strict=True):
            check_integer(f"{name} directions", size, at_least=1, at_most=most)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias)
        # At least float32, whatever the weight's dtype, so that small changes of the core are not lost to rounding.
        core = torch.zeros(core_shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.core = nn.Parameter(core)
        self.register_buffer("merged", core.clone())  # the part of the core that W includes already
        U, V = basis.to(weight.device, weight.dtype).both()
        # Not persistent: bases are the same for all blocks, and `save_bases` stores them once.
        self.register_buffer("in_basis", U[:, : core_shape[1]].contiguous(), persistent=False)
        self.register_buffer("out_basis", V[:, : core_shape[0]].contiguous(), persistent=False)
        self._merged_version = self.core._version

    @classmethod
    def from_linear(cls, linear: nn.Linear, basis: Basis, core_shape: tuple[int, int]) -> BlockLinear:
        """Make a layer from copies of the weight (out, in) and bias of `linear`.

        Raises:
            UserError: as the class, and for a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
        """
        check_linear(linear, "a block")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(linear.weight.detach().clone(), bias, basis, core_shape)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ordinary linear that computes the same function."""
        self.merge()
        out_features, in_features = self.weight.shape
        # On `meta`, so that no weight is allocated and initialized just to be replaced.
        linear = nn.Linear(in_features, out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())  # type: ignore[assignment]
        return linear

    @torch.no_grad()
    def merge(self) -> None:
        """Add to W what has changed in the core since the last merge."""
        # The version counts in-place writes. Comparing values instead would make the CPU wait for the GPU.
        if self.core._version == self._merged_version:
            return
        change = self.core - self.merged  # (c, r)
        left, right = self._factor_change(change)  # (out, k) and (k, in), with k the shorter side of the core
        if self.weight.dtype == torch.bfloat16:
            add_stochastic(self.weight, left @ right, self.core)
        else:
            self.weight.addmm_(left.to(self.weight.dtype), right.to(self.weight.dtype))
        self.merged.copy_(self.core)
        self._merged_version = self.core._version

    @torch.no_grad()
    def _cast_weight(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`, cast once after each merge instead of in each forward pass, as under autocast."""
        W = self.weight
        if W.dtype == dtype:
            return W
        # Any write increments the version, except those through `.data`; a move to another device changes the address.
        state = (dtype, W._version, W.data_ptr())
        if self._cast is None or self._cast[0] != state:
            self._cast = None  # frees the old copy first
            self._cast = (state, W.detach().to(dtype))
        return self._cast[1]

    def _factor_change(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """V_c change U_r^T as a product of two matrices; the longer side of the core (c, r) is multiplied first."""
        right = self.in_basis.to(change.dtype).T
        V_c = self.out_basis.to(change.dtype)
        return (V_c, change @ right) if change.shape[0] < change.shape[1] else (V_c @ change, right)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products use its dtype, as in `nn.Linear`."""
        self.merge()
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            W, U_r, V_c = self._cast_weight(dtype), self.in_basis.to(dtype), self.out_basis.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            y = _BlockLinear.apply(tokens, W, bias, self.core, U_r, V_c)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Without the cast weight, which the copy makes for itself."""
        return {name: value for name, value in vars(self).items() if name != "_cast"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _keep_out_of_compiler()
        # A copied core has a new version counter, and the copy may have been made between a step and its merge.
        self._merged_version = -1

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in={in_features}, out={out_features}, core={tuple(self.core.shape)}"


def share_bases(layers: Sequence[BlockLinear]) -> None:
    """Let layers of one basis and one core shape share the same two matrices, which saves memory."""
    for layer in layers[1:]:
        layer.in_basis, layer.out_basis = layers[0].in_basis, layers[0].out_basis


def core_shape(shape: tuple[int, int], density: float) -> tuple[int, int]:
    """The core shape (c, r) with the share `density` of the entries of a weight (out, in): sqrt(density) of each side.

    Raises:
        UserError: for a density outside (0, 1].
    """
    check_density(density)
    rows, columns = (max(1, round(density**0.5 * size)) for size in shape)
    return rows, columns


@functools.cache
def _keep_out_of_compiler() -> None:
    """Exclude from torch.compile what writes to W by a counter of versions, which the compiler does not trace.

    Not as decorators: they import the compiler, which takes longer than importing the rest of this library and torch.
    """
    for name in ("merge", "_cast_weight"):
        setattr(BlockLinear, name, torch.compiler.disable(getattr(BlockLinear, name)))  # type: ignore[no-untyped-call]
