"""Full fine-tuning: every parameter trains with AdamW (Regular FT in the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sparsegrad.methods.base import (
    Context,
    Prepared,
    adamw,
    count_trainable,
    freeze,
    trainable_parameters,
)
from sparsegrad.targets import Linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every parameter trains; with `train.train_rest=false` only the MLP weights and the head."""

    name: str = "full"
    can_shard: ClassVar[bool] = True

    def check(self, linears: Linears) -> None:
        """Full fine-tuning has no settings to check."""

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=True)
        per_weight = {kind: rows * columns for kind, (rows, columns) in weight_shapes(linears).items()}
        return Prepared(
            optimizer=adamw(trainable_parameters(model), context),
            trainable=count_trainable(model, linears, per_weight),
            trainable_per_weight=per_weight,
        )
