"""LoRA-SB: a core between the singular vectors of the first full step (arXiv 2411.19557).

Engine `fast` takes its directions from many gradients, shares them among the layers of a kind, and starts at W instead
of at the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsegrad.errors import check_integer
from sparsegrad.methods.base import Context, Prepared
from sparsegrad.methods.core import Factors, check_size, count_cores, find_ranks, prepare_cores
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.targets import Linears


@dataclass(frozen=True, kw_only=True)
class LoraSb:
    """W + B R A with B R A = U_r S_r V_r^T, the best approximation of rank r to Adam's first full step.

    That step is -lr sign(G) for the mean gradient G of the calibration. R (r, r) trains and starts at S_r.

    Attributes:
        density: share of a weight's entries that the core has: r^2 is closest to it; or
        rank: r.
        steps: calibration batches; the paper takes a thousandth of the training rows.
    """

    density: float | None = 0.01
    rank: int | None = None
    steps: int = 8
    name: str = "lora_sb"
    collects_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self.density, self.rank)
        check_integer("method.steps", self.steps, at_least=1, remedy="it initialises from gradients")

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if the rank is 0 or exceeds the smaller side of a weight."""
        find_ranks(linears, self.density, self.rank)

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        return count_cores(linears, find_ranks(linears, self.density, self.rank))

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        ranks = find_ranks(linears, self.density, self.rank)

        def compute_factors() -> dict[str, Factors]:
            gradients = mean_gradients(model, linears, context, self.steps)
            return {
                name: _decompose_step(-context.lr * gradients.pop(name).sign(), ranks[kind])
                for kind, found in linears.items()
                for name in found
            }

        factors, cost = context.measure(compute_factors)
        prepared = prepare_cores(model, linears, context, lambda kind, name, linear: factors.pop(name))
        return replace(prepared, calibration=cost)


def _decompose_step(step: Tensor, rank: int) -> Factors:
    """U_r, S_r and V_r^T of a step (out, in); copies, as views would keep the whole decomposition."""
    U, S, Vh = torch.linalg.svd(step, full_matrices=False)
    return U[:, :rank].clone(), torch.diag(S[:rank]), Vh[:rank].clone()
