"""The sparse update rotated back into the weight without a matrix of the change."""

from __future__ import annotations

import pytest
import torch
from engine_checks import basis_of, draw
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradAdamW
from sparsegrad.optim import updates
from sparsegrad.optim.scratch import Scratch
from sparsegrad.optim.selection import _find_true
from sparsegrad.optim.updates import add_sparse_

SHAPES = [(48, 40), (40, 48), (44, 44)]
SIDES = ["both", "in", "out", None]


def part_of(shape: tuple[int, int], sides: str | None) -> Basis | None:
    return None if sides is None else basis_of(*shape).only(sides).by_columns()


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_rotated_sparse_matrix(shape: tuple[int, int], sides: str | None) -> None:
    basis, scratch = part_of(shape, sides), Scratch()
    for seed in range(2):  # the second call finds used buffers
        weight, values = draw(*shape, seed=seed), draw(30, seed=seed + 5)
        index = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))[:30].sort().values
        sparse = torch.zeros(weight.numel()).double().scatter_(0, index, values).view(shape)
        expected = weight + (sparse if basis is None else basis.unrotate(sparse))
        add_sparse_(weight, basis, index, values, scratch)
        assert torch.allclose(weight, expected, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_whole_matrices(
    shape: tuple[int, int], sides: str | None, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    for in_place in (True, False):
        monkeypatch.setattr(updates, "_adds_in_place", lambda *_, in_place=in_place: in_place)
        weight = nn.Parameter(draw(*shape))
        group = {"params": [weight], "keep": 30, "basis": part_of(shape, sides)}
        optimizer = SparseGradAdamW([group], lr=1e-2, weight_decay=weight_decay)
        for seed in range(3):
            weight.grad = draw(*shape, seed=seed + 1)
            optimizer.step()
        found.append(weight.detach())
    assert torch.allclose(*found, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("keep", [3, 1920])
def test_weight_decay_of_float64_is_as_precise_as_torch_s(count: int, keep: int) -> None:
    """Without gradients weights only decay, here by 1e-8, which a factor in float32 does not have."""
    found: list[Tensor] = []
    for make, group in ((SparseGradAdamW, {"keep": keep}), (torch.optim.AdamW, {})):
        weights = [nn.Parameter(draw(48, 40, seed=seed)) for seed in range(count)]
        optimizer = make([{"params": weights, **group}], lr=1e-5, weight_decay=1e-3)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        found.append(torch.stack(weights).detach())
    assert torch.allclose(*found, rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", [0, 7, 8, 64, 1000, 1001])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_true_entries_are_found_in_order(size: int, share: float) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < share
    assert torch.equal(_find_true(mask), mask.nonzero().flatten())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("sides", SIDES)
def test_weight_decay_of_fixed_positions_is_theirs_alone(
    sides: str | None, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rotated weight: each of these entries loses its share, and no other entry moves."""
    monkeypatch.setattr(updates, "_adds_in_place", lambda *_: in_place)
    shape, positions = (48, 40), torch.arange(7, 1900, 63)
    basis = part_of(shape, sides)
    rotate = (lambda matrix: matrix) if basis is None else basis.rotate
    moved: dict[float, Tensor] = {}
    for decay in (0.0, 0.1):
        weight = nn.Parameter(draw(*shape))
        group = {"params": [weight], "keep": len(positions), "basis": basis}
        optimizer = SparseGradAdamW([group], lr=1e-2, weight_decay=decay)
        optimizer.state[weight] |= {"positions": positions, "step": torch.zeros(())}
        weight.grad = draw(*shape, seed=1)
        optimizer.step()
        moved[decay] = rotate(weight.detach() - draw(*shape)).flatten()
    expected = torch.zeros(1920).double()
    expected[positions] = -1e-2 * 0.1 * rotate(draw(*shape)).flatten()[positions]
    assert torch.allclose(moved[0.1] - moved[0.0], expected, atol=1e-10)
    others = torch.ones(1920, dtype=torch.bool).index_fill(0, positions, value=False)
    assert moved[0.1][others].abs().max() < (1e-12 if sides else 1e-300)
    assert (moved[0.1][positions].abs() > 1e-4).all()
