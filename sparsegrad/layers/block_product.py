"""The product of engine `fast`: its gradient is one fixed leading block of the rotated gradient.

This is not the exact method. HOSVD sorts directions by energy, so the leading r input and c output directions hold much
of the gradient. Their block of the rotated gradient can be computed without rotating the whole gradient. With the
leading columns U_r (n, r) and V_c (m, c) of the bases of a linear with n inputs and m outputs,

    core gradient = (dy V_c)^T (x U_r)    (c, r)

takes at most T (n r + m c + r c) multiplications for T tokens, instead of T n m. Back-propagation stores x U_r (T, r)
instead of x (T, n). If c is large, V_c^T (dy^T (x U_r)) gives the same with T m r + m r c multiplications, a cost that
only r keeps small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.layers.common import core_gradient, refuse_second_order
from sparsegrad.layers.shards import average_shards, layout_of

REMEDY = "use engine='exact' with rotation_order='gradient'"


class BlockProduct(torch.autograd.Function):
    """y = x W^T + b with gradients for x, b and the core. W (out, in) already includes V_c core U_r^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, core: Tensor, U_r: Tensor, V_c: Tensor) -> Tensor:
        # x (T, in) itself is not saved: its gradient needs only W, and that of the core only x U_r (T, r). As in
        # `nn.Linear`, W may change before a backward pass that does not need it.
        needs_x, _, _, needs_core, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x.to(U_r.dtype) @ U_r if needs_core else None, W if needs_x else None, V_c)
        ctx.core_dtype, ctx.layout = core.dtype, layout_of(core)
        return nn.functional.linear(x, W.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(REMEDY)
        (dy,), (x_r, W, V_c) = grads, ctx.saved_tensors
        # FSDP2 has gathered W again by now. Storing a cast copy between the passes would undo that: it is made twice.
        dx = dy @ W.to(dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        dcore = core_gradient(dy.to(V_c.dtype), x_r, V_c).to(ctx.core_dtype) if ctx.needs_input_grad[3] else None
        if dcore is not None and ctx.layout is not None:
            dcore = average_shards(dcore, ctx.layout)
        return dx, None, db, dcore, None, None
