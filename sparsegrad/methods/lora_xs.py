"""LoRA-XS: a core between the leading singular vectors of each weight (arXiv 2405.17604).

Engine `fast` has a core, too: it lies between the leading singular vectors of the calibration's gradients, which all
layers of a kind share, and starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsegrad.methods.base import Context, Prepared
from sparsegrad.methods.core import Factors, prepare_cores
from sparsegrad.methods.core_method import CoreMethod
from sparsegrad.targets import Linears

_SPREAD = 1e-5  # standard deviation of the core's first values, as in the paper: nearly no change


@dataclass(frozen=True, kw_only=True)
class LoraXs(CoreMethod):
    """W + B R A with B = U_r S_r and A = V_r^T of the singular value decomposition W = U S V^T; R (r, r) trains.

    Attributes:
        density, rank: see `CoreMethod`.
    """

    name: str = "lora_xs"

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        ranks = self.find_ranks(linears)

        def make_factors(kind: str, name: str, linear: nn.Linear) -> Factors:
            U, S, Vh = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
            r = ranks[kind]
            return U[:, :r] * S[:r], torch.randn(r, r, device=U.device) * _SPREAD, Vh[:r]

        return prepare_cores(model, linears, context, make_factors)
