"""Engine `layer`: the paper's linear layer, which stores its weight in the rotated space (section 3.2, Table 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.errors import check_choice
from sparsegrad.layers.common import (
    check_fit,
    check_input,
    check_linear,
    make_linear,
    product_dtype,
    refuse_second_order,
    refuse_transforms,
)
from sparsegrad.layers.sparse_matmul import sparse_dense_matmul
from sparsegrad.optim.selection import count_kept, top_k_index

_REMEDY = "use engine='exact' with rotation_order='gradient'"
BACKWARDS = ("regular", "sparse_dense")


class _RotatedLinear(torch.autograd.Function):
    """y = x U W~^T V^T, with the sparse weight gradient top-k(V^T dy^T x U).

    This is Table 2 of the paper, except for its row Grad Input, whose dimensions do not match as printed. The correct
    product is dx = (dy V) W~ U^T.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, keep: int, backward: str) -> Tensor:
        x_rotated = x @ U  # (tokens, in)
        ctx.save_for_backward(x_rotated, weight, U, V)
        ctx.keep, ctx.matmul = keep, sparse_dense_matmul if backward == "sparse_dense" else torch.matmul
        return x_rotated @ weight.to(x.dtype).T @ V.T  # (tokens, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(_REMEDY)
        x_rotated, weight, U, V = ctx.saved_tensors
        dy_rotated = ctx.matmul(grads[0], V)  # (tokens, out)
        dx = ctx.matmul(dy_rotated, weight.to(U.dtype)) @ U.T if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            gradient = ctx.matmul(dy_rotated.T, x_rotated)  # (out, in)
            # Cast before selecting: under autocast the weight's dtype differs, and autograd cannot cast a COO gradient.
            dW = _select_entries(gradient.to(weight.dtype), ctx.keep)
        return dx, dW, None, None, None, None


def _select_entries(gradient: Tensor, keep: int) -> Tensor:
    """The `keep` largest entries of a matrix (out, in) as sparse COO."""
    index = top_k_index(gradient, keep)
    rows, columns = index // gradient.shape[1], index % gradient.shape[1]  # (keep,) each
    values = gradient.flatten()[index]
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, gradient.shape, check_invariants=False)


class SparseGradLinear(nn.Module):
    """A linear layer that computes the same function as an `nn.Linear`, with a sparse gradient in the rotated space.

    The forward pass is y = x U W~^T V^T + b with W~ = V^T W U. The gradient of `rotated_weight` is a sparse COO tensor
    with `keep` entries: train it with `SparseGradAdamW` or `torch.optim.SparseAdam`. Torch has no norm of such
    gradients, so `clip_grad_norm_` fails; use engine `exact` where gradients are clipped.

    All blocks share the bases, which are fixed, so they are not part of the state dict. The parameter is called
    `rotated_weight`, so that no ordinary linear loads it by mistake. `to_linear` returns the ordinary linear.

    Args:
        rotated_weight: W~ (out, in).
        bias: (out,) or None.
        basis: U (in, in) and V (out, out).
        keep: number of kept entries of the gradient, 1 to out * in.
        backward: `regular`; or `sparse_dense`, which skips the zero rows and columns of dy (paper, eq. 1-2) and
            gives the same result.

    Raises:
        UserError: for a basis of another shape or of one side, `keep` out of range, or an unknown `backward`.
    """

    in_basis: Tensor
    out_basis: Tensor

    def __init__(self, rotated_weight: Tensor, bias: Tensor | None, basis: Basis, keep: int, backward: str) -> None:
        super().__init__()
        check_fit(basis, rotated_weight)
        self.keep = count_kept(rotated_weight.shape, keep=keep)
        self.backward_mode = check_choice("backward", backward, BACKWARDS)
        self.rotated_weight = nn.Parameter(rotated_weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        U, V = basis.both()
        # Buffers follow the model to its device.
        self.register_buffer("in_basis", U, persistent=False)
        self.register_buffer("out_basis", V, persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        basis: Basis,
        *,
        keep: int | None = None,
        density: float | None = None,
        backward: str = "regular",
    ) -> SparseGradLinear:
        """Make a layer from copies of the weight (out, in) and bias of `linear`.

        Args:
            linear: stays unchanged.
            basis: basis of both sides; moved to the weight's device and dtype.
            keep: number of kept entries. Give either this or `density`.
            density: share of kept entries, in (0, 1].
            backward: as for the class.

        Raises:
            UserError: as the class, and for a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
        """
        check_linear(linear, "engine layer")
        weight = linear.weight.detach()
        check_fit(basis, weight)
        basis = basis.to(weight.device, weight.dtype)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(basis.rotate(weight), bias, basis, count_kept(weight.shape, keep=keep, density=density), backward)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ordinary linear that computes the same function: W = V W~ U^T."""
        bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return make_linear(nn.Parameter(self.basis.unrotate(self.rotated_weight)), bias)

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The ordinary weight W = V W~ U^T (out, in), for code that reads a linear's weight, as T5 does for its dtype.

        It is a copy, computed by two products at each access. Writing to it does not change the layer.
        """
        return self.basis.unrotate(self.rotated_weight.detach())

    @property
    def basis(self) -> Basis:
        """U and V as a `Basis`."""
        return Basis(self.in_basis, self.out_basis)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) to y (..., out). As in `nn.Linear`, y has the dtype of autocast if it is enabled.

        The products have that dtype too, except with float16: they are computed in float32.
        """
        x = input  # the parameter's name is that of `nn.Linear`
        if torch.is_grad_enabled():
            refuse_transforms(_REMEDY)
        check_input(x, self.rotated_weight, self.bias, _REMEDY)
        out_dtype = product_dtype(x)
        # A rotation may gather a token's norm in one entry, which float16 may not hold.
        dtype = torch.float32 if out_dtype == torch.float16 else out_dtype
        with torch.autocast(x.device.type, enabled=False):
            tokens, U, V = x.reshape(-1, x.shape[-1]).to(dtype), self.in_basis.to(dtype), self.out_basis.to(dtype)
            y = _RotatedLinear.apply(  # type: ignore[no-untyped-call]
                tokens, self.rotated_weight, U, V, self.keep, self.backward_mode
            )
            # Outside the Function: the bias is not rotated, and autograd knows the gradient of a sum.
            y = y if self.bias is None else y + self.bias.to(dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(out_dtype)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        out_features, in_features = self.rotated_weight.shape
        return f"in={in_features}, out={out_features}, keep={self.keep}, backward={self.backward_mode}"
