"""Models and optimizers that adapter tests save, and what holds for an adapter of any model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_states import bits, has_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsegrad import load_adapter, prepare, save_adapter
from sparsegrad.adapter.format import FACTS, TENSORS

Batches = list[dict[str, Tensor]]


class Prepared:
    """The groups of an optimizer of `prepare` for one linear without a basis."""

    def __init__(self, weight: Tensor, name: str = "0.weight", keep: int = 4) -> None:
        group = {"kind": "only", "param_names": [name], "params": [weight], "keep": keep, "density": None}
        self.param_groups: list[dict[str, Any]] = [{**group, "basis": None}]


def own_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))


def changed(base: nn.Sequential) -> nn.Sequential:
    """Two weights `sparse`, the biases `whole`."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5] += 1
    return model


def train(model: Any, batches: Batches, steps: int = 3, lr: float = 1e-2, **settings: Any) -> Any:
    """Steps of engine `exact`; returns the optimizer."""
    optimizer = prepare(model, batches, lr=lr, calibration_steps=2, **(settings or {"density": 0.02}))
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    return optimizer


def stored(folder: Path) -> dict[str, Any]:
    """Name -> facts of each tensor in the adapter."""
    tensors: dict[str, Any] = json.loads((folder / FACTS).read_text())["tensors"]
    return tensors


def edit_facts(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and make the sha256 fit, as somebody who means it would."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "x"})
    edit_facts(folder, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())


def check_merge_and_unmerge(base: nn.Module, batches: Batches, folder: Path) -> None:
    """Merged, the base has the trained model's bits; unmerged, its own; twice over."""
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = train(model, batches)
    save_adapter(model, folder, base, optimizer)
    adapter = load_adapter(fresh, folder)
    assert has_bits(fresh, bits(base)), "loading changes nothing"
    for _ in range(2):
        adapter.merge()
        assert adapter.merged
        assert has_bits(fresh, bits(model))
        adapter.unmerge()
        assert not adapter.merged
        assert has_bits(fresh, bits(base))


def check_tolerance(base: nn.Module, batches: Batches, folder: Path) -> None:
    """Few entries changed in the rotated space: they and the columns of the basis they need are smaller than W."""
    model = copy.deepcopy(base)
    optimizer = train(model, batches, steps=2, keep=4)
    exact = save_adapter(model, folder / "exact", base, optimizer)
    small = save_adapter(model, folder / "small", base, optimizer, tolerance=1e-3)
    assert small.forms["rotated"] > 0
    assert small.mlp_bytes < exact.mlp_bytes
    fresh = copy.deepcopy(base)
    load_adapter(fresh, folder / "small").merge()
    facts = stored(folder / "small")
    for name, weight in fresh.state_dict().items():
        old, new = base.state_dict()[name].double(), model.state_dict()[name].double()
        if facts.get(name, {}).get("form") == "rotated":
            assert 0 < (weight.double() - new).norm() < 1.1e-3 * (new - old).norm()
        else:
            assert torch.equal(weight, model.state_dict()[name])
