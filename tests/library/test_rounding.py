"""Stochastic rounding of bfloat16 weights, whose noise must not repeat."""

from __future__ import annotations

import torch
from torch import nn

from sparsegrad import SparseGradAdamW


def test_gradients_that_repeat_do_not_repeat_the_noise() -> None:
    """A few gradients in bfloat16 are often the same: with the same noise, what is rounded down once always is."""
    weight = nn.Parameter(torch.ones(4, 4).bfloat16())
    optimizer = SparseGradAdamW([{"params": [weight], "keep": 16}], lr=1e-4)  # a 78th of what a bfloat16 can move
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = 1 - weight.detach().float()
    assert abs(float(moved.mean()) - 0.04) < 0.015
    assert (moved > 0).all()
