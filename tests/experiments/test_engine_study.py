"""The engines that only the study has: at an extreme setting, each must equal an engine of the library."""

from __future__ import annotations

import pytest
import torch
from test_optim import IN, OUT, batches, groups, network, random_basis, train

from experiments.studies.engines import ARMS, HeldSupport
from sparsegrad import SparseGradAdamW
from sparsegrad.layers.block import BlockLinear


def held(interval: int) -> tuple[HeldSupport, torch.nn.Sequential]:
    model = network()
    optimizer = HeldSupport(groups(model, basis=random_basis(), density=0.1), lr=1e-2)
    optimizer.interval = interval
    return optimizer, model


def test_a_support_chosen_anew_at_every_step_is_the_exact_engine() -> None:
    model = network()
    exact = train(model, [SparseGradAdamW(groups(model, basis=random_basis(), density=0.1), lr=1e-2)], batches(10))
    optimizer, model = held(1)
    assert train(model, [optimizer], batches(10)) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(("interval", "supports"), [(100, 1), (5, 2)])
def test_a_held_support_is_chosen_once_an_interval(interval: int, supports: int) -> None:
    """The rotated weight changes in all held entries and in no others."""
    optimizer, model = held(interval)
    before, basis = model[0].weight.detach().clone(), random_basis()
    train(model, [optimizer], batches(10))
    moved = (basis.rotate(model[0].weight.detach() - before).abs() > 1e-12).sum()
    kept = round(0.1 * OUT * IN)
    assert kept <= moved <= supports * kept
    assert (moved == kept) == (supports == 1)


def test_a_block_with_its_largest_entries_trains_one_percent_of_the_weight() -> None:
    model = torch.nn.Module()
    model.up = torch.nn.Linear(40, 60).double()
    basis = random_basis(60, 40)
    optimizer = ARMS["block_4_percent_top"](model, {"up": {"up": model.up}}, {"up": basis}, 1e-2)
    before = model.up.weight.detach().clone()
    assert isinstance(model.up, BlockLinear)
    model.up(torch.randn(9, 40, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moved = basis.rotate(model.up.to_linear().weight.detach() - before).abs() > 1e-12
    assert int(moved.sum()) == round(0.01 / 0.04 * 12 * 8) == 24
    assert not moved[12:].any()
    assert not moved[:, 8:].any()
