"""Prepare a small model, train three steps with each engine, save and load an adapter: `python scripts/smoke.py`.

It needs an installed sparsegrad with its core dependencies alone; `make test-wheel` runs it in a fresh environment.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from types import SimpleNamespace

import torch
from torch import nn

import sparsegrad


class Model(nn.Module):
    """Two MLPs with LLaMA's names of modules, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(2)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """x, labels: (batch, 16)."""
        for block in self.layers:
            x = x + block["down"](torch.relu(block["up"](x)))
        return SimpleNamespace(loss=(x - labels).square().mean())


def main() -> None:
    """Raise if anything goes wrong; else print what was done."""
    torch.manual_seed(0)
    batches = [{"x": torch.randn(8, 16), "labels": torch.randn(8, 16)} for _ in range(4)]
    for engine in ("exact", "fast"):
        base = Model()
        model = copy.deepcopy(base)
        optimizer = sparsegrad.prepare(
            model, batches, target_modules=["up", "down"], density=0.1, calibration_steps=4, engine=engine
        )
        print(sparsegrad.describe(optimizer))
        for batch in batches[:3]:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        sparsegrad.to_linears(model)
        with tempfile.TemporaryDirectory() as folder:
            sparsegrad.save_adapter(model, folder, base, target_modules=["up", "down"])
            loaded = copy.deepcopy(base)
            sparsegrad.load_adapter(loaded, folder).merge()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    extras = [
        name for name in ("transformers", "hydra", "datasets", "peft", "pandas", "scipy") if sys.modules.get(name)
    ]
    assert not extras, f"the library loaded {extras}"
    print(f"sparsegrad {sparsegrad.__version__}: both engines trained, saved and loaded")


if __name__ == "__main__":
    main()
