"""Entries of the weights that are chosen once and then train: static masks (arXiv 2412.13488).

SparseGrad chooses anew in each step, in the rotated space; `sparsegrad_static` chooses once, in the rotated space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import check_choice, check_integer
from sparsegrad.methods.base import Context, Prepared, check_kept, count_trainable, freeze, kept_per_weight
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import param_groups
from sparsegrad.targets import Linears

CHOICES = ("gradient", "random")


@dataclass(frozen=True, kw_only=True)
class StaticMask:
    """AdamW on the same entries of each weight in every step; moments and weight decay are of these entries alone.

    Attributes:
        density: share of these entries, (0, 1]; or
        keep: their number.
        choice: `gradient`: the largest mean squared gradient of the calibration; `random`: drawn for each weight.
            SHiRA of peft draws too, but the same entries for all weights of a shape, and multiples of in + out.
        steps: calibration batches; not used with `random`.
    """

    density: float | None = 0.01
    keep: int | None = None
    choice: str = "gradient"
    steps: int = 30
    name: str = "static_mask"

    def __post_init__(self) -> None:
        check_kept(self.density, self.keep)
        check_choice("method.choice", self.choice, CHOICES)
        check_integer("method.steps", self.steps, at_least=1)

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if `keep` exceeds the size of a weight."""
        kept_per_weight(linears, self.density, self.keep)

    @property
    def collects_gradients(self) -> bool:
        """See `Method`."""
        return self.choice == "gradient"

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=True)
        per_weight = kept_per_weight(linears, self.density, self.keep)
        cost: dict[str, Any] = {}
        if self.choice == "gradient":
            scores, cost = context.measure(
                lambda: mean_gradients(model, linears, context, self.steps, lambda kind, gradient: gradient.square())
            )
        else:
            named = {name: linear.weight for found in linears.values() for name, linear in found.items()}
            scores = {name: torch.rand(weight.shape).to(weight.device) for name, weight in named.items()}
        groups = param_groups(model, linears, dict.fromkeys(linears), keep=self.keep, density=self.density)
        optimizer = SparseGradAdamW(groups, lr=context.lr, weight_decay=context.weight_decay, fused=True)
        fix_positions(optimizer, linears, scores, per_weight)
        return Prepared(
            optimizer=optimizer,
            trainable=count_trainable(model, linears, per_weight),
            trainable_per_weight=per_weight,
            calibration=cost,
        )


def fix_positions(
    optimizer: SparseGradAdamW, linears: Linears, scores: Mapping[str, Tensor], per_weight: Mapping[str, int]
) -> None:
    """From now on, each step of `optimizer` trains the entries with the largest scores, instead of choosing.

    Args:
        optimizer: has the weights of `linears` in SparseGrad groups.
        linears: layer kind -> name -> linear.
        scores: name of a linear -> score (out, in) of each entry, of the rotated weight where there is a basis.
        per_weight: layer kind -> number of entries.
    """
    for kind, found in linears.items():
        for name, linear in found.items():
            positions = scores[name].flatten().topk(per_weight[kind]).indices.sort().values
            # A step count besides: torch refuses a state without one where it loads the optimizer.
            optimizer.state[linear.weight] |= {"positions": positions, "step": torch.zeros((), device=positions.device)}
