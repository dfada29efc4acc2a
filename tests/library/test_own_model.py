"""A model of one's own, of no known layout: what is wrong is named, and the remedy works."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsegrad import UserError, load_adapter, prepare, save_adapter
from sparsegrad.optim.adamw import SparseGradAdamW

Batch = dict[str, torch.Tensor]


class Own(nn.Module):
    """Two linears and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(4, 50), nn.Linear(50, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.wide(x)).square().mean()}


@pytest.fixture
def trained() -> tuple[Own, Own, SparseGradAdamW]:
    """The base, the trained model, and its optimizer."""
    torch.manual_seed(0)
    model = Own()
    base, batches = copy.deepcopy(model), [{"x": torch.randn(8, 4)} for _ in range(2)]
    optimizer = prepare(model, batches, ["wide"], density=0.1, lr=0.1, calibration_steps=2)
    model(**batches[0])["loss"].backward()
    optimizer.step()
    return base, model, optimizer


def test_a_weight_too_small_for_the_density_is_named() -> None:
    with pytest.raises(UserError, match=r"density=0\.01 keeps no entry of head\.weight \(1, 50\): give at least 0\.02"):
        prepare(Own(), [], ["wide", "head"])


def test_without_the_optimizer_the_error_names_that_argument(
    trained: tuple[Own, Own, SparseGradAdamW], tmp_path: Path
) -> None:
    base, model, optimizer = trained
    with pytest.raises(UserError, match=r"give base= as .* a copy of the model"):  # not hidden by the other mistake
        save_adapter(model, tmp_path)
    with pytest.raises(UserError, match=r"target_modules=\[\.\.\.\].*; or give optimizer="):
        save_adapter(model, tmp_path, base)
    save_adapter(model, tmp_path, base, optimizer)
    load_adapter(base, tmp_path).merge()
    assert torch.equal(base.wide.weight, model.wide.weight)


def test_another_base_is_named(trained: tuple[Own, Own, SparseGradAdamW], tmp_path: Path) -> None:
    base, model, optimizer = trained
    save_adapter(model, tmp_path, base, optimizer)
    with pytest.raises(UserError, match=r"is not the base's .*: load Own as it was before the training"):
        load_adapter(Own(), tmp_path)
