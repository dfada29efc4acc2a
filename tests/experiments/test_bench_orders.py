"""The predicted cost of engine exact is what a pass multiplies, for the order that the layer takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench.arithmetic import COSTS, Linear, relative_speed
from sparsegrad import Basis
from sparsegrad.layers.replace import rotate_gradients

N, M = 24, 40


@pytest.mark.parametrize("tokens", [8, 32, 64])  # by tokens, mixed, and by the gradient
@pytest.mark.parametrize(("cost", "sides"), [("both_sides", "both"), ("small_side", "small")])
@pytest.mark.parametrize("shape", [(N, M), (M, N)])
def test_the_predicted_cost_is_what_a_pass_multiplies(
    shape: tuple[int, int], cost: str, sides: str, tokens: int
) -> None:
    n, m = shape
    linear = nn.Linear(n, m)
    rotate_gradients({"one": {"0": linear}}, {"one": Basis.identity(m, n).only(sides)})
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(tokens, n, requires_grad=True)).square().sum().backward()
    x = Linear(n=n, m=m, T=tokens, c=1, r=1, s=1)
    back = min(n, m) / (2 * tokens) if sides == "both" else 0  # the update is rotated back in the step
    assert counter.get_total_flops() == pytest.approx((COSTS[cost](x) - back) * x.product)


def test_the_cheapest_order_is_never_slower_than_that_of_the_gradient() -> None:
    for tokens in (16, 180, 512, 2048, 8192):
        x = Linear(n=768, m=3072, T=tokens, c=1, r=1, s=1)
        assert relative_speed("both_sides", [x]) >= relative_speed("both_sides_gradient", [x])
    assert COSTS["small_side"](Linear(n=768, m=3072, T=180, c=1, r=1, s=1)) == pytest.approx(1.625)
