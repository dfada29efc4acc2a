"""SparseGrad as in the authors' code, where it differs from the paper's text; each difference is a switch.

Sources: the authors' repository (GitHub sayankotor/sparse_grads) and the paper (arXiv 2410.07383).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, fail
from sparsegrad.layers.common import check_linear
from sparsegrad.methods.base import Context, Prepared, adamw, freeze, trainable_parameters
from sparsegrad.methods.bases import BASES, calibrated_bases, transpose_in_basis
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.targets import Linears, all_linears

MAX_NORM = 1.0  # of the Trainer's clipping


@dataclass(frozen=True, kw_only=True)
class SparseGradAuthors(SparseGrad):
    """SparseGrad with the following differences, all on by default. The YAML sets `keep`, and `steps` to 11.

    Attributes:
        transposed_in_basis: rotate by V^T G U^T instead of V^T G U, which is an arbitrary rotation of the input side.
        rotated_bias_gradient: the gradient of the MLP biases is V^T db instead of db.
        frozen_layer_norm: LayerNorm parameters do not train.
        training_calibration: the calibration trains the whole model with AdamW, and its updates are kept.
        clipped_calibration: the steps of that calibration are clipped to a gradient norm of 1.
    """

    density: float | None = None
    transposed_in_basis: bool = True
    rotated_bias_gradient: bool = True
    frozen_layer_norm: bool = True
    training_calibration: bool = True
    clipped_calibration: bool = True
    name: str = "sparsegrad_authors"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis in BASES:
            raise UserError(
                f"method.basis={self.basis} is an option of method=sparsegrad: leave it null, the switches of "
                "method=sparsegrad_authors choose the basis"
            )
        if self.basis is not None and self.training_calibration:
            raise UserError(
                f"method.basis={self.basis} skips the calibration that method.training_calibration=true asks for: set "
                "that to false, or method.basis to null"
            )
        if self.sides != "both":
            both = "the authors' code rotates both sides, and so do the switches of method=sparsegrad_authors"
            raise fail("method.sides", self.sides, both, "leave it at both, or use method=sparsegrad")

    def check(self, linears: Linears) -> None:
        """See `Method`; also refuse GPT-2's `Conv1D`, whose weight (in, out) has its sides the other way round."""
        # First: the remedy of engine `layer` is the other engine, which this method refuses as well.
        for linear in all_linears(linears):
            check_linear(linear, f"method={self.name}", "use method=sparsegrad")
        super().check(linears)

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        self._check_context(linears, context)
        freeze(model, linears, context, mlp_weights=True)
        bases, cost = self.find_bases(model, linears, context)
        if self.transposed_in_basis:
            bases = {kind: transpose_in_basis(basis) for kind, basis in bases.items()}
        if self.frozen_layer_norm:  # after the calibration, which trains them too
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(False)
        prepared = self.build(model, linears, context, bases, cost)
        if self.rotated_bias_gradient:
            _rotate_bias_gradients(model, linears, bases)
        return prepared

    def find_bases(
        self, model: nn.Module, linears: Linears, context: Context
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Return bases and cost; unless switched off, the calibration is ordinary training."""
        if not self.training_calibration:
            return super().find_bases(model, linears, context)
        # An optimizer of its own: its moments are discarded after the calibration.
        parameters = trainable_parameters(model)
        optimizer = adamw(parameters, context)

        def update() -> None:
            if self.clipped_calibration:
                # The code keeps the Trainer's default there; the gradients were collected before.
                nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            # An autocast around the whole calibration would go on multiplying by its copies of the weights before.
            torch.clear_autocast_cache()

        return calibrated_bases(model, linears, context, self.steps, update=update)


def _rotate_bias_gradients(model: nn.Module, linears: Linears, bases: Mapping[str, Basis]) -> None:
    for kind, found in linears.items():
        for name in found:
            bias = model.get_submodule(name).bias  # looked up again: engine `layer` has replaced the linear
            if isinstance(bias, Tensor) and bias.requires_grad:
                bias.register_hook(_make_rotation_hook(bases[kind]))  # type: ignore[no-untyped-call]


def _make_rotation_hook(basis: Basis) -> Callable[[Tensor], Tensor]:
    V = basis.out_basis  # (out, out)
    assert V is not None
    return lambda gradient: V.T.to(gradient) @ gradient
