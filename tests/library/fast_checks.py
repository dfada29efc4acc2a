"""What tests of `prepare(engine="fast")` share: a toy BERT, its batches, and a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toy_models import toy_batches, toy_model

from sparsegrad import SparseGradAdamW, prepare
from sparsegrad.layers.block import BlockLinear

LR, DENSITY = 1e-2, 0.1
BATCHES = toy_batches("bert", 6)


def bert(dtype: torch.dtype = torch.float32) -> Any:
    return toy_model("bert", dtype)


def fast(model: nn.Module, **options: Any) -> SparseGradAdamW:
    return prepare(model, BATCHES, lr=LR, calibration_steps=3, engine="fast", **{"density": DENSITY, **options})


def train(model: Any, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]] = BATCHES) -> None:
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def blocks(model: nn.Module) -> list[BlockLinear]:
    return [module for module in model.modules() if isinstance(module, BlockLinear)]
