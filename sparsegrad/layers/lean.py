"""A linear with a cheaper weight gradient: it drops padding tokens (exact), or saves its input in bfloat16.

Only dW = dy^T x changes; the products y = x W^T and dx = dy W do not. The layer is intended for engine `exact`, which
needs the whole dW, but works with any optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError, check_choice
from sparsegrad.layers.common import check_linear, product_dtype


class _LeanLinear(torch.autograd.Function):
    """y = x W^T + b with x (tokens, in) saved in `layer.save_dtype` and dW (out, in) by `layer.weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, layer: LeanLinear) -> Tensor:
        saved = x.to(layer.save_dtype or x.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(saved, W)
        ctx.layer = layer
        return nn.functional.linear(x, W.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, W) = grads, ctx.saved_tensors
        dx = dy @ W.to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        dW = ctx.layer.weight_gradient(dy, x).to(W.dtype) if ctx.needs_input_grad[1] else None
        return dx, dW, db, None


class LeanLinear(nn.Linear):
    """An `nn.Linear` with the same parameters whose weight gradient is cheaper.

    Args:
        linear: the linear whose weight (out, in) and bias this layer shares.
        drop_padding: leave out tokens whose output gradient is zero, as it is for padding. The sum is the same with
            fewer terms. The number of such tokens is read on the host, which makes the CPU wait for a GPU.
        save_dtype: dtype in which x is saved for dW, such as `torch.bfloat16`: half the memory, but rounded products.

    Raises:
        UserError: for a dtype that is not floating, or a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        drop_padding: bool = False,
        save_dtype: torch.dtype | None = None,
    ) -> None:
        check_linear(linear, "a lean linear", "leave drop_padding and save_dtype off")
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.drop_padding = check_choice("drop_padding", drop_padding, (True, False))
        if save_dtype is not None and not save_dtype.is_floating_point:
            raise UserError(f"save_dtype={save_dtype} is not allowed: give a floating dtype, e.g. torch.bfloat16")
        self.save_dtype = save_dtype

    def to_linear(self) -> nn.Linear:
        """An ordinary linear that shares the parameters of this layer."""
        # On `meta`, so that no weight is allocated and initialized just to be replaced.
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products use its dtype, as in `nn.Linear`."""
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = _LeanLinear.apply(tokens, self.weight, bias, self)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dW (out, in) from dy (tokens, out) and the saved x (tokens, in)."""
        if self.drop_padding:
            rows = dy.any(1).nonzero().flatten()  # tokens that contribute to the sum
            if len(rows) < len(dy):  # otherwise indexing would only copy
                dy, x = dy[rows], x[rows]
        # In the saved dtype: casting x back would allocate the copy that saving it in bfloat16 avoids.
        return dy.to(x.dtype).T @ x
