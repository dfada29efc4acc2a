"""SparseGrad as the paper's text defines it (sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsegrad.basis import SIDES, Basis, load_bases, small_side
from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.hashing import file_sha256
from sparsegrad.layers.common import check_linear
from sparsegrad.layers.replace import replace_linear, rotate_gradients, to_linears
from sparsegrad.layers.rotated import BACKWARDS, SparseGradLinear
from sparsegrad.methods.base import (
    Context,
    Prepared,
    check_kept,
    count_trainable,
    freeze,
    kept_per_weight,
)
from sparsegrad.methods.bases import BASES, calibrated_bases, make_basis, refuse_untransposed, transpose_in_basis
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.methods.static_mask import fix_positions
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import param_groups
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.orders import ORDERS
from sparsegrad.optim.rotation import check_rotation_dtype
from sparsegrad.targets import Linears, all_linears, weight_shapes

ENGINES = ("exact", "layer")
_DTYPES = {None: None, "bf16": torch.bfloat16}
# Settings of one engine, with the value that they must have under the other.
_ENGINE_SETTINGS: dict[str, dict[str, Any]] = {
    "layer": {"backward": "regular"},
    "exact": {
        "sides": "both", "moments": "dense", "release_gradients": False, "drop_padding": False, "save_dtype": None,
        "rotation_order": "auto", "rotation_dtype": None, "static": False,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SparseGrad:
    """Top-k entries of the rotated gradient, Adam on them, AdamW on everything outside the MLP weights.

    Attributes:
        density: share of kept entries per weight and step, (0, 1]; or
        keep: their number.
        steps: calibration batches.
        engine: `exact` (rotation in the optimizer) or `layer` (the paper's `SparseGradLinear`). In exact arithmetic
            both give the same weights, except with accumulation: `exact` selects once per step, `layer` in every
            micro-batch.
        backward: for engine `layer`: `regular` or `sparse_dense`.
        sides: what engine `exact` rotates: `both` (the method), or only `in`, `out` or `small`. One side is not the
            method, but its rotation costs a sixth to a fifth (see docs/performance.md).
        moments: for engine `exact`: `dense` (the method) or `support`, which needs a tenth of the memory and is not
            the method.
        release_gradients: for engine `exact`: update each MLP weight as soon as its gradient is computed, then free
            the gradient. Changes rounding at most.
        drop_padding: for engine `exact`: leave padding, which contributes zero, out of the gradients of the MLP
            weights, also on a GPU, where the CPU waits for the count. Changes rounding at most.
        save_dtype: for engine `exact`: `bf16` stores the inputs of the MLP linears rounded until their weight
            gradient is computed; None: as they are.
        rotation_order: for engine `exact`: `auto`, the cheapest order of products for the tokens at hand; `gradient`,
            the optimizer rotates plain gradients; or one of the others in `sparsegrad.optim.orders`. Changes rounding
            at most.
        rotation_dtype: for engine `exact`: `bf16` rotates gradients in bfloat16 with sums in float32, on hardware that
            has it; None: in the dtype of the weights.
        static: for engine `exact`: choose the entries once, by the mean squared rotated gradient of the calibration,
            and keep moments of these alone. Not the paper's method.
        basis: None or `hosvd`: the method's, the HOSVD of the calibration; or a file with stored bases, instead of a
            calibration; or, to study what the basis does, `authors` (U transposed, as in their code), `random`
            (orthogonal, drawn once per layer kind) or `none` (the identity).
    """

    density: float | None = 0.01
    keep: int | None = None
    steps: int = 30
    engine: str = "exact"
    backward: str = "regular"
    sides: str = "both"
    moments: str = "dense"
    release_gradients: bool = False
    drop_padding: bool = False
    save_dtype: str | None = None
    rotation_order: str = "auto"
    rotation_dtype: str | None = None
    static: bool = False
    basis: str | None = None
    name: str = "sparsegrad"
    has_bases: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kept(self.density, self.keep)
        check_integer("method.steps", self.steps, at_least=1, remedy="the paper uses 30")
        check_choice("method.engine", self.engine, ENGINES)
        check_choice("method.backward", self.backward, BACKWARDS)
        check_choice("method.sides", self.sides, SIDES)
        check_choice("method.moments", self.moments, tuple(MOMENTS))
        check_choice("method.release_gradients", self.release_gradients, (True, False))
        check_choice("method.drop_padding", self.drop_padding, (True, False))
        check_choice("method.rotation_order", self.rotation_order, ORDERS)
        dtypes, remedy = tuple(_DTYPES), "null keeps them as they are"
        check_choice("method.save_dtype", self.save_dtype, dtypes, remedy, none="null")
        remedy = "null rotates in that of the weights"
        check_choice("method.rotation_dtype", self.rotation_dtype, dtypes, remedy, none="null")
        check_choice("method.static", self.static, (True, False))
        for name, value in _ENGINE_SETTINGS["layer" if self.engine == "exact" else "exact"].items():
            if getattr(self, name) != value:
                default = "null" if value is None else str(value).lower()  # as in YAML
                raise UserError(
                    f"method.{name}={getattr(self, name)} does not belong to method.engine={self.engine}: "
                    f"set method.{name}={default}, or use the other engine"
                )

        if self.basis == "authors" and self.sides == "out":
            raise refuse_untransposed(self.sides, "the basis of the input side")
        if self.static and self.moments != "dense":
            raise UserError(
                f"method.static=true never selects again, so method.moments={self.moments} has no effect: leave it out"
            )

    def check(self, linears: Linears) -> None:
        """Raise `UserError` for settings that do not fit the linears.

        These are a `keep` above the size of a weight, a basis file of other shapes, a basis that `sides` leaves nothing
        of, and for GPT-2's `Conv1D` what needs an `nn.Linear`.
        """
        kept_per_weight(linears, self.density, self.keep)
        self._check_classes(linears)
        if self.basis == "authors" and self.sides == "small":
            for kind, shape in weight_shapes(linears).items():
                if small_side(shape) == "out":
                    raise refuse_untransposed(self.sides, f"the basis of the inputs, of which {kind} {shape} has more")
        if self.basis_file is not None:
            self._load_bases(linears)

    def _check_classes(self, linears: Linears) -> None:
        """Raise `UserError` if a setting needs the class `nn.Linear` and a linear is of another."""
        if self.engine == "layer":
            needs, remedy = "method.engine=layer", "use method.engine=exact"
        elif self.drop_padding or self.save_dtype is not None:
            needs = "method.drop_padding=true" if self.drop_padding else f"method.save_dtype={self.save_dtype}"
            remedy = "set method.drop_padding=false and method.save_dtype=null"
        else:
            return
        for linear in all_linears(linears):
            check_linear(linear, needs, remedy)

    @property
    def basis_file(self) -> Path | None:
        """See `Method`."""
        return None if self.basis is None or self.basis in BASES else Path(self.basis)

    @property
    def collects_gradients(self) -> bool:
        """See `Method`."""
        return self.static

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        self._check_context(linears, context)
        freeze(model, linears, context, mlp_weights=True)
        bases, cost = self.find_bases(model, linears, context)
        return self.build(model, linears, context, bases, cost)

    def _check_context(self, linears: Linears, context: Context) -> None:
        """Raise `UserError` if settings do not fit the accumulation or the device."""
        if self.release_gradients and context.accumulation > 1:
            raise UserError(
                f"method.release_gradients=true does not go with train.grad_accumulation={context.accumulation}, which "
                "adds up the gradients of several passes: set the first to false, or the second to 1"
            )
        check_rotation_dtype(_DTYPES[self.rotation_dtype], next(all_linears(linears)).weight.device)

    def find_bases(
        self, model: nn.Module, linears: Linears, context: Context
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Return the bases of all layer kinds and their cost: from the given file, the store, or a calibration."""
        if self.basis in ("random", "none"):
            return {kind: make_basis(self.basis, shape).only(self.sides).to(next(all_linears(linears)).weight.device)
                    for kind, shape in weight_shapes(linears).items()}, {"basis": self.basis}  # fmt: skip
        if self.basis == "authors":
            bases, cost = calibrated_bases(model, linears, context, self.steps, sides=self.sides)
            return {kind: transpose_in_basis(basis) for kind, basis in bases.items()}, cost
        if self.basis_file is not None:
            given = {kind: basis.only(self.sides) for kind, basis in self._load_bases(linears).items()}
            return given, {"file": self.basis, "sha256": file_sha256(self.basis_file)}
        return calibrated_bases(model, linears, context, self.steps, sides=self.sides)

    def build(
        self,
        model: nn.Module,
        linears: Linears,
        context: Context,
        bases: Mapping[str, Basis],
        cost: dict[str, Any],
    ) -> Prepared:
        """Set up the engine and its optimizer for given bases."""
        per_weight = kept_per_weight(linears, self.density, self.keep)
        scores = None
        if self.static:
            scores, selection = context.measure(lambda: self._score_entries(model, linears, context, bases))
            cost = {**cost, "selection": selection}
        # Counted first: engine `layer` replaces the linears.
        trainable = count_trainable(model, linears, per_weight)
        optimizer = SparseGradAdamW(
            self._make_groups(model, linears, bases), lr=context.lr, weight_decay=context.weight_decay, fused=True
        )
        if scores is not None:
            fix_positions(optimizer, linears, scores, per_weight)
        if self.release_gradients:
            optimizer.release_gradients()
        return Prepared(
            optimizer=optimizer,
            trainable=trainable,
            trainable_per_weight=per_weight,
            calibration=cost,
            finish=lambda: to_linears(model),
        )

    def _score_entries(
        self, model: nn.Module, linears: Linears, context: Context, bases: Mapping[str, Basis]
    ) -> dict[str, Tensor]:
        """Name of a linear -> mean squared rotated gradient (out, in), over the calibration's batches."""

        def square(kind: str, gradient: Tensor) -> Tensor:
            return bases[kind].to(gradient.device, gradient.dtype).rotate(gradient).square()

        return mean_gradients(model, linears, context, self.steps, square)

    def _make_groups(self, model: nn.Module, linears: Linears, bases: Mapping[str, Basis]) -> list[dict[str, Any]]:
        if self.engine == "layer":
            return self._insert_layers(model, linears, bases)
        rotations = rotate_gradients(
            linears,
            bases,
            order=self.rotation_order,
            dtype=_DTYPES[self.rotation_dtype],
            drop_padding=self.drop_padding,
            save_dtype=_DTYPES[self.save_dtype],
        )
        return param_groups(
            model,
            linears,
            bases,
            keep=self.keep,
            density=self.density,
            moments=self.moments,
            rotations=rotations,
        )

    def _insert_layers(self, model: nn.Module, linears: Linears, bases: Mapping[str, Basis]) -> list[dict[str, Any]]:
        rotated = []
        for kind, found in linears.items():
            for name, linear in found.items():
                layer = SparseGradLinear.from_linear(
                    linear, bases[kind], keep=self.keep, density=self.density, backward=self.backward
                )
                layer.bias = linear.bias  # the same parameter: a run knows by it what is no MLP weight
                replace_linear(model, name, linear, layer)
                rotated.append(layer.rotated_weight)
        taken = {id(weight) for weight in rotated}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": rotated, "keep": self.keep, "density": self.density}, {"params": rest}]

    def _load_bases(self, linears: Linears) -> dict[str, Basis]:
        assert self.basis is not None
        bases = load_bases(self.basis)
        for kind, shape in weight_shapes(linears).items():
            if kind not in bases or not bases[kind].fits(shape):
                found = {name: basis.shape for name, basis in bases.items()}
                raise UserError(
                    f"method.basis={self.basis} has bases for {found}, but the model's weights of kind {kind} are "
                    f"{shape}: give a basis of this model, or null to calibrate"
                )
        return bases
