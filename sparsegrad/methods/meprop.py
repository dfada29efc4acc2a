"""MeProp: AdamW on the largest entries of the unrotated gradient (paper, section 4; as in the authors' code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsegrad.methods.base import (
    Context,
    Prepared,
    adamw,
    check_kept,
    count_trainable,
    freeze,
    kept_per_weight,
    trainable_parameters,
)
from sparsegrad.optim.selection import count_kept, top_k_index
from sparsegrad.targets import Linears, all_linears


@dataclass(frozen=True, kw_only=True)
class MeProp:
    """AdamW on the gradient G (out, in) with all but its largest entries set to zero.

    The moments of AdamW are dense, as in the authors' code, so an entry keeps moving after it is no longer selected.
    More entries than `keep` move in a step, although its gradient has only `keep` nonzero entries.

    Attributes:
        density: share of kept entries per weight and step, (0, 1]; or
        keep: their number.
    """

    density: float | None = 0.01
    keep: int | None = None
    name: str = "meprop"

    def __post_init__(self) -> None:
        check_kept(self.density, self.keep)

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if `keep` exceeds the size of a weight."""
        kept_per_weight(linears, self.density, self.keep)

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=True)
        per_weight = kept_per_weight(linears, self.density, self.keep)
        optimizer = adamw(trainable_parameters(model), context)
        weights = [linear.weight for linear in all_linears(linears)]

        def mask(*_: Any) -> None:  # runs before the step, so after accumulation
            for weight in weights:
                if weight.grad is not None:
                    keep_largest_(weight.grad, count_kept(weight.shape, keep=self.keep, density=self.density))

        optimizer.register_step_pre_hook(mask)
        return Prepared(
            optimizer=optimizer,
            trainable=count_trainable(model, linears, per_weight),
            trainable_per_weight=per_weight,
        )


def keep_largest_(gradient: torch.Tensor, keep: int) -> None:
    """Set all but the `keep` largest entries of a matrix (out, in) to zero, in place."""
    flat = gradient.view(-1)  # (out * in,), shares memory with the gradient
    index = top_k_index(gradient, keep)
    values = flat[index]
    flat.zero_()
    flat[index] = values
