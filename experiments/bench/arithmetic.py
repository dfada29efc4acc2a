"""What a step of each method costs by counting multiplications in its MLP linears.

For one linear with n inputs, m outputs and T tokens, the forward pass and the input gradient cost F = 4 T n m, and all
else is told in shares of F. Counted are matrix products alone: no activation function, top-k, optimizer, launch or
memory traffic, and nothing outside the MLP linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear in a setting: n inputs, m outputs, T tokens, the block's c outputs by r inputs, LoRA's rank s."""

    n: int
    m: int
    T: float
    c: int
    r: int
    s: int

    @property
    def product(self) -> float:
        """F, the multiplications and additions of the forward pass and the input gradient."""
        return 4 * self.T * self.n * self.m


def _block(x: Linear, c: int, r: int) -> float:
    """x U_r, the core V_c^T dy^T x U_r in the cheaper order, its change merged into W by way of its smaller side."""
    outputs_first = c / (2 * x.n) + r * c / (2 * x.n * x.m)
    inputs_first = r / (2 * x.n) + r * c / (2 * x.n * x.T)
    return 1 + r / (2 * x.m) + min(outputs_first, inputs_first) + min(r, c) / (2 * x.T)


Cost = Callable[[Linear], float]
"""A linear to its cost in shares of F."""

COSTS: dict[str, Cost] = {
    "frozen": lambda x: 1.0,
    "full": lambda x: 1.5,
    "lora": lambda x: 1 + 1.5 * x.s * (x.n + x.m) / (x.n * x.m),
    "layer": lambda x: 1.5 + x.n / x.m + x.m / x.n,
    # The gradient rotated on both sides, and the sparse update rotated back: sparse by dense, then one dense product.
    "both_sides": lambda x: 1.5 + (x.n + x.m) / (2 * x.T) + min(x.n, x.m) / (2 * x.T),
    "small_side": lambda x: 1.5 + min(x.n, x.m) / (2 * x.T),
    "block": lambda x: _block(x, x.c, x.r),
}


def relative_speed(cost: str, linears: list[Linear], reference: str = "full") -> float:
    """Predicted steps/s of `cost` over those of `reference`, if a step were its MLP linears alone."""
    totals = (sum(COSTS[name](linear) * linear.product for linear in linears) for name in (reference, cost))
    return next(totals) / next(totals)
