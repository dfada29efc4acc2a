"""What tests of all engines share: random matrices, bases, and each engine's layer by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradLinear, hosvd
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.lean import LeanLinear

OUT, IN, TOKENS = 5, 4, 6
LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(out: int, features: int, seed: int = 0) -> Basis:
    return hosvd(draw(3, out, features, seed=seed))


def unfolded_svd(stack: list[Tensor]) -> Basis:
    """The definition: left singular vectors of the unfoldings of the stacked tensor (count, out, in)."""
    tensor = torch.stack(stack)
    out_unfolding, in_unfolding = tensor.transpose(0, 1).flatten(1), tensor.movedim(2, 0).flatten(1)
    return Basis(torch.linalg.svd(in_unfolding).U, torch.linalg.svd(out_unfolding).U)


ENGINES: dict[str, Callable[[nn.Linear, Basis, float], nn.Module]] = {
    "layer regular": lambda linear, basis, density: SparseGradLinear.from_linear(linear, basis, density=density),
    "layer sparse_dense": lambda linear, basis, density: SparseGradLinear.from_linear(
        linear, basis, density=density, backward="sparse_dense"
    ),
    "block": lambda linear, basis, density: BlockLinear.from_linear(linear, basis, (1, 1)),
    "lean": lambda linear, basis, density: LeanLinear(linear, drop_padding=True),
}
