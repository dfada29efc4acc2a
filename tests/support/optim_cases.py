"""A small network for the tests of the optimizer: one SparseGrad weight, and the rest."""

from __future__ import annotations

import torch
from torch import nn

from sparsegrad import Basis, hosvd

OUT, IN = 12, 8


def random_basis(out: int = OUT, features: int = IN, seed: int = 0) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    return hosvd(torch.randn(3, out, features, generator=generator, dtype=torch.float64))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 3)).double()


def groups(model: nn.Sequential, **sparse: object) -> list[dict]:
    rest = [parameter for parameter in model.parameters() if parameter is not model[0].weight]
    return [{"params": [model[0].weight], **sparse}, {"params": rest}]
