"""What the optimizer holds to in the corners: low precision, refused steps, hooks, a scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsegrad import Basis, SparseGradAdamW, hosvd

SHAPE = (12, 8)


def weights(count: int = 2, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def basis() -> Basis:
    return hosvd(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(parameter.dtype)


@pytest.mark.parametrize("rotated", [True, False])
def test_weight_decay_of_bfloat16_weights_adds_up(rotated: bool) -> None:
    """1,000 steps of lr 1e-3 and decay 0.1: 1.10 becomes 0.995, which to the nearest stays as it is."""
    groups = {"keep": 64, "basis": Basis.identity(64, 48) if rotated else None}
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.full((64, 48), 1.1).to(dtype))
        optimizer = SparseGradAdamW([{"params": [weight], **groups}], lr=1e-3, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            weight.grad = 1e-12 * torch.randn(64, 48, generator=generator).to(dtype)
            optimizer.step()
        means[dtype] = float(weight.detach().float().mean())
    assert means[torch.float32] == pytest.approx(0.995, abs=2e-3)
    assert means[torch.bfloat16] == pytest.approx(means[torch.float32], abs=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_of_finer_weights_is_one_product_before_the_change(dtype: torch.dtype) -> None:
    """To the bit, against the change of the same step without decay."""
    decayed, plain = weights(dtype=dtype), weights(dtype=dtype)
    group = {"keep": 9, "basis": basis()}
    give_gradients(decayed, 0)
    give_gradients(plain, 0)
    SparseGradAdamW([{"params": decayed, **group}], lr=1e-2, weight_decay=0.1).step()
    zeros = [nn.Parameter(torch.zeros_like(weight)) for weight in plain]
    give_gradients(zeros, 0)
    SparseGradAdamW([{"params": zeros, **group}], lr=1e-2).step()
    factor = 1 - torch.tensor(1e-2 * 0.1)  # a tensor of float32, as a flag times a number is
    for weight, before, change in zip(decayed, plain, zeros, strict=True):
        assert torch.equal(weight, before * factor + change)
