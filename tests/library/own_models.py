"""A model of a user's own: two MLPs with ordinary linears, and how it is prepared and trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad import prepare

NAMES = ["up", "down"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(input=x)))


class Net(nn.Module):
    """Two MLPs and a head; the loss is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Mlp() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=(self.head(x).flatten() - labels).square().mean())


def batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": x, "labels": x[:, 0] * x[:, 1]} for x in torch.randn(count, 8, 8, generator=generator)]


def prepared(model: nn.Module, **options: Any) -> Any:
    return prepare(
        model, batches(), **{"target_modules": NAMES, "calibration_steps": 4, "lr": 1e-2, "density": 0.1, **options}
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> float:
    for batch in batches(count, seed=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def outputs(model: Net, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return model.head(x).flatten()
