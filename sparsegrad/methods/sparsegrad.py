"""SparseGrad as the paper's text defines it (sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sparsegrad.basis import Basis, load_bases
from sparsegrad.calibration import calibrate
from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.linear import BACKWARDS, SparseGradLinear
from sparsegrad.methods.base import (
    Context,
    Prepared,
    check_kept,
    count_trainable,
    freeze,
    kept_per_weight,
    replace_linear,
    restore_linears,
    weight_shapes,
)
from sparsegrad.mlp import Linears
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.prepare import param_groups

ENGINES = ("merged", "layer")


def calibrated_bases(
    model: nn.Module, linears: Linears, context: Context, steps: int, *, update: Callable[[], None] | None = None
) -> tuple[dict[str, Basis], dict[str, Any]]:
    """The bases of all layer kinds and what they cost, from the store or from `steps` batches.

    A calibration that trains by `update` is never taken from the store: its updates would be missing.
    """
    mlp = {kind: list(found.values()) for kind, found in linears.items()}
    batches, progress = islice(context.batches(), steps), partial(tqdm, desc="calibration", leave=False)
    settings = {"steps": steps} if update is None else None
    return context.calibrated(settings, lambda: calibrate(model, batches, mlp, steps, update=update, progress=progress))


@dataclass(frozen=True, kw_only=True)
class SparseGrad:
    """Top-k entries of the rotated gradient, Adam on them, AdamW on everything outside the MLP weights.

    Attributes:
        density: share of kept entries per weight and step, (0, 1]; or
        keep: their number.
        steps: calibration batches.
        engine: `merged` (rotation in the optimizer) or `layer` (the paper's `SparseGradLinear`); the same trajectory in
            exact arithmetic, but for accumulation: `merged` selects once per step, `layer` in every micro-batch.
        backward: of engine `layer`: `regular` or `sparse_dense`.
        basis: file with stored bases to use instead of calibrating.
    """

    density: float | None = 0.01
    keep: int | None = None
    steps: int = 30
    engine: str = "merged"
    backward: str = "regular"
    basis: str | None = None
    name: str = "sparsegrad"

    def __post_init__(self) -> None:
        check_kept(self.density, self.keep)
        check_integer("method.steps", self.steps, at_least=1, remedy="the paper takes 30")
        check_choice("method.engine", self.engine, ENGINES)
        check_choice("method.backward", self.backward, BACKWARDS)
        if self.engine == "merged" and self.backward != "regular":
            raise UserError(f"method.backward={self.backward} belongs to method.engine=layer: set that, or use regular")

    def check(self, linears: Linears) -> None:
        """`keep` may not exceed a weight's size; a given basis file must fit the shapes."""
        kept_per_weight(linears, self.density, self.keep)
        if self.basis is not None:
            self._load(linears)

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=True)
        bases, cost = self.find_bases(model, linears, context)
        return self.build(model, linears, context, bases, cost)

    def find_bases(
        self, model: nn.Module, linears: Linears, context: Context
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        """The bases of all layer kinds and what they cost: from the given file, the store, or calibration."""
        if self.basis is not None:
            return self._load(linears), {"file": self.basis}
        return calibrated_bases(model, linears, context, self.steps)

    def build(
        self,
        model: nn.Module,
        linears: Linears,
        context: Context,
        bases: Mapping[str, Basis],
        cost: dict[str, Any],
    ) -> Prepared:
        """The engine and its optimizer for given bases."""
        per_weight = kept_per_weight(linears, self.density, self.keep)
        trainable = count_trainable(model, linears, per_weight)
        layer = self.engine == "layer"
        if layer:
            groups = self._layer(model, linears, bases)
        else:
            groups = param_groups(model, linears, bases, keep=self.keep, density=self.density)
        return Prepared(
            optimizer=SparseGradAdamW(groups, lr=context.lr, weight_decay=context.weight_decay, fused=True),
            trainable=trainable,
            trainable_per_weight=per_weight,
            calibration=cost,
            finish=lambda: restore_linears(model, linears) if layer else None,
        )

    def _layer(self, model: nn.Module, linears: Linears, bases: Mapping[str, Basis]) -> list[dict[str, Any]]:
        rotated = []
        for kind, found in linears.items():
            for name, linear in found.items():
                layer = SparseGradLinear.from_linear(
                    linear, bases[kind], keep=self.keep, density=self.density, backward=self.backward
                )
                replace_linear(model, name, linear, layer)
                rotated.append(layer.rotated_weight)
        taken = {id(weight) for weight in rotated}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": rotated, "keep": self.keep, "density": self.density}, {"params": rest}]

    def _load(self, linears: Linears) -> dict[str, Basis]:
        assert self.basis is not None
        bases = load_bases(self.basis)
        for kind, shape in weight_shapes(linears).items():
            if kind not in bases or bases[kind].shape != shape:
                found = {name: basis.shape for name, basis in bases.items()}
                raise UserError(
                    f"method.basis={self.basis} holds bases for {found}, but the model's weights of kind {kind} "
                    f"are {shape}: name a basis of this model, or null to calibrate"
                )
        return bases
