"""LoRA-XS: a core between the leading singular vectors of each weight (arXiv 2405.17604).

Engine `fast` has a core, too: it lies between the leading singular vectors of the calibration's gradients, which all
layers of a kind share, and starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsegrad.methods.base import Context, Prepared
from sparsegrad.methods.core import Factors, check_size, count_cores, find_ranks, prepare_cores
from sparsegrad.targets import Linears

_SPREAD = 1e-5  # standard deviation of the core's first values, as in the paper: nearly no change


@dataclass(frozen=True, kw_only=True)
class LoraXs:
    """W + B R A with B = U_r S_r and A = V_r^T of the singular value decomposition W = U S V^T; R (r, r) trains.

    Attributes:
        density: share of a weight's entries that the core has: r^2 is closest to it; or
        rank: r.
    """

    density: float | None = 0.01
    rank: int | None = None
    name: str = "lora_xs"

    def __post_init__(self) -> None:
        check_size(self.density, self.rank)

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if the rank is 0 or exceeds the smaller side of a weight."""
        find_ranks(linears, self.density, self.rank)

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        return count_cores(linears, find_ranks(linears, self.density, self.rank))

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        ranks = find_ranks(linears, self.density, self.rank)

        def make_factors(kind: str, name: str, linear: nn.Linear) -> Factors:
            U, S, Vh = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            r = ranks[kind]
            return U[:, :r] * S[:r], torch.randn(r, r, device=U.device) * _SPREAD, Vh[:r]

        return prepare_cores(model, linears, context, make_factors)
