"""Engine `fast`: trains a fixed block of the rotated gradient; not the paper's method (`sparsegrad.layers.block`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sparsegrad.errors import check_integer, check_number
from sparsegrad.layers.common import check_linear, core_shape
from sparsegrad.layers.replace import to_linears, use_blocks
from sparsegrad.methods.base import Context, Prepared, adamw, freeze, trainable_parameters
from sparsegrad.methods.bases import calibrated_bases
from sparsegrad.targets import Linears, all_linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class SparseGradFast:
    """AdamW on the leading block of the rotated gradient; everything else as in `SparseGrad`.

    Attributes:
        density: share of a weight's entries in the block, (0, 1].
        steps: calibration batches.
    """

    density: float = 0.01
    steps: int = 30
    name: str = "sparsegrad_fast"
    has_bases: ClassVar[bool] = True
    holds_factors: ClassVar[bool] = True
    can_shard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("method.density", self.density, above=0, at_most=1, remedy="such as 0.01")
        check_integer("method.steps", self.steps, at_least=1, remedy="the paper uses 30")

    def check(self, linears: Linears) -> None:
        """Raise `UserError` for GPT-2's `Conv1D`; every block fits its weight by construction."""
        for linear in all_linears(linears):
            check_linear(linear, f"method={self.name}", "use method=sparsegrad")

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        cores = {kind: core_shape(shape, self.density) for kind, shape in weight_shapes(linears).items()}
        return sum(rows * columns * len(linears[kind]) for kind, (rows, columns) in cores.items())

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=True)  # as in `SparseGrad`, so that both share stored bases
        bases, cost = calibrated_bases(model, linears, context, self.steps)
        shapes = {kind: core_shape(shape, self.density) for kind, shape in weight_shapes(linears).items()}
        use_blocks(model, linears, bases, self.density)
        parameters = trainable_parameters(model)
        return Prepared(
            optimizer=adamw(parameters, context),
            trainable=sum(parameter.numel() for parameter in parameters),
            trainable_per_weight={kind: rows * columns for kind, (rows, columns) in shapes.items()},
            calibration=cost,
            finish=lambda: to_linears(model),
        )
