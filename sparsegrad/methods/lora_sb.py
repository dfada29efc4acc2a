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
from sparsegrad.methods.core import Factors, prepare_cores
from sparsegrad.methods.core_method import CoreMethod
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.targets import Linears


@dataclass(frozen=True, kw_only=True)
class LoraSb(CoreMethod):
    """W + B R A with B R A = U_r S_r V_r^T, the best approximation of rank r to Adam's first full step.

    That step is -lr sign(G) for the mean gradient G of the calibration. R (r, r) trains and starts at S_r.

    Attributes:
        density, rank: see `CoreMethod`.
        steps: calibration batches; the paper takes a thousandth of the training rows.
    """

    steps: int = 8
    name: str = "lora_sb"
    collects_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("method.steps", self.steps, at_least=1, remedy="it initialises from gradients")

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        ranks = self.find_ranks(linears)

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
