"""Predicted cost of a training step of each method: the multiplications in its MLP linears.

For one linear with n inputs, m outputs and T tokens, the forward pass and the input gradient cost F = 4 T n m; all
costs are given as multiples of F. Only matrix products of the MLP linears count: no activation function, top-k,
optimizer, kernel launch or memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegrad.optim.orders import FIXED_ORDERS, Order, cheapest_order


@dataclass(frozen=True)
class Linear:
    """One linear in a setting: n inputs, m outputs, T tokens, block of c outputs by r inputs, LoRA rank s."""

    n: int
    m: int
    T: float
    c: int
    r: int
    s: int

    @property
    def product(self) -> float:
        """F: multiplications and additions of the forward pass and the input gradient."""
        return 4 * self.T * self.n * self.m


def _block(x: Linear, c: int, r: int) -> float:
    """Engine fast: x U_r, the core V_c^T dy^T x U_r in the cheaper order, and merging the core's change into W."""
    # The core is a product of three matrices; which pair comes first decides the cost.
    outputs_first = c / (2 * x.n) + r * c / (2 * x.n * x.m)
    inputs_first = r / (2 * x.n) + r * c / (2 * x.n * x.T)
    return 1 + r / (2 * x.m) + min(outputs_first, inputs_first) + min(r, c) / (2 * x.T)


def _rotation(x: Linear, sides: str, order: Order) -> float:
    """Rotating the gradient: each side token by token, or as part of the gradient (`sparsegrad.optim.orders`)."""
    inputs = (x.T if order.inputs else x.m) * x.n**2 if sides != "out" else 0
    outputs = (x.T if order.outputs else x.n) * x.m**2 if sides != "in" else 0
    return 2 * (inputs + outputs) / x.product


def _exact(x: Linear, sides: str, order: str = "auto") -> float:
    """Engine exact: the gradient rotated in `order`, and the sparse update rotated back.

    The longer side of the update is a sparse product, which is not counted. With both sides, a dense one follows.
    """
    small = "in" if x.n <= x.m else "out"
    sides = small if sides == "small" else sides
    chosen = cheapest_order(round(x.T), x.n, x.m, sides) if order == "auto" else FIXED_ORDERS[order]
    back = min(x.n, x.m) / (2 * x.T) if sides == "both" else 0.0
    return 1.5 + _rotation(x, sides, chosen) + back


Cost = Callable[[Linear], float]
"""Cost of a linear as a multiple of F."""

COSTS: dict[str, Cost] = {
    "frozen": lambda x: 1.0,
    "full": lambda x: 1.5,  # the weight gradient is a third product of the same size
    "lora": lambda x: 1 + 1.5 * x.s * (x.n + x.m) / (x.n * x.m),
    # x U and y V^T forward, and the same two rotations of the gradient backward: (T n^2 + T m^2) each way.
    "layer": lambda x: 1.5 + x.n / x.m + x.m / x.n,
    "both_sides": lambda x: _exact(x, "both"),
    "both_sides_gradient": lambda x: _exact(x, "both", "gradient"),
    "small_side": lambda x: _exact(x, "small"),
    "block": lambda x: _block(x, x.c, x.r),
}


def relative_speed(cost: str, linears: list[Linear], reference: str = "full") -> float:
    """Predicted steps/s of `cost` divided by those of `reference`, if a step were its MLP linears alone."""
    totals = (sum(COSTS[name](linear) * linear.product for linear in linears) for name in (reference, cost))
    return next(totals) / next(totals)
