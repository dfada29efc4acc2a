"""The rotated gradient V^T dy^T x U of a linear, by the cheapest order of its products.

A linear has n inputs, m outputs, weight W (m, n), input x (T, n) for T tokens, and output gradient dy (T, m). Its
gradient is G = dy^T x (m, n), T n m multiply-adds. Each side can be rotated in one of two places:

    inputs:   token by token, x U, T n^2; or as columns of the gradient, G U, m n^2
    outputs:  token by token, dy V, T m^2; or as rows of the gradient, V^T G, n m^2

The two choices are independent, so there are four orders. Rotation is linear: all four give the same matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Where each side is rotated: True token by token, before dy^T x; False as part of the gradient, after it."""

    inputs: bool
    outputs: bool


FIXED_ORDERS = {
    "gradient": Order(inputs=False, outputs=False),
    "tokens": Order(inputs=True, outputs=True),
    "inputs": Order(inputs=True, outputs=False),
    "outputs": Order(inputs=False, outputs=True),
}
ORDERS = ("auto", *FIXED_ORDERS)


def cheapest_order(tokens: int, n_in: int, n_out: int, sides: str = "both") -> Order:
    """The order with the fewest multiply-adds.

    Those of a rotation by tokens and of a rotation of the gradient cost the same on a CPU; other devices were not
    measured.

    Args:
        tokens: number of tokens that contribute to the gradient; may be zero.
        n_in, n_out: features of the linear.
        sides: which sides are rotated: `both`, `in` or `out`. A side that is not rotated counts as False.
    """
    # T n^2 < m n^2 and T m^2 < n m^2: each side is compared with the features of the other.
    return Order(sides != "out" and tokens < n_out, sides != "in" and tokens < n_in)


def rotated_gradient(dy: Tensor, x: Tensor, U: Tensor | None, V: Tensor | None, order: Order) -> Tensor:
    """V^T dy^T x U (out, in) in the given order.

    The product dy^T x has the dtype of the tokens; float32 instead of float16 if a rotation precedes it, because that
    rotation may gather a token's norm in one entry and overflow. Each rotation has the dtype of its basis, and its
    result is cast to that of the product.

    Args:
        dy: output gradients (tokens, out).
        x: inputs (tokens, in), of the dtype of `dy`.
        U, V: bases (in, in) and (out, out); None for a side that is not rotated.
        order: where each side is rotated.

    Returns:
        The rotated gradient (out, in): in the dtype of the bases if the gradient was rotated, or that of the tokens.
    """
    if torch.float16 in (x.dtype, dy.dtype) and (order.inputs or order.outputs):
        x, dy = x.float(), dy.float()
    if U is not None and order.inputs:
        x = (x.to(U.dtype) @ U).to(x.dtype)
    if V is not None and order.outputs:
        dy = (dy.to(V.dtype) @ V).to(dy.dtype)
    gradient = dy.T @ x  # (out, in)
    if U is not None and not order.inputs:
        gradient = gradient.to(U.dtype) @ U
    if V is not None and not order.outputs:
        gradient = V.T @ gradient.to(V.dtype)
    return gradient
