"""SparseGrad as the paper's text defines it (sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparsegrad.basis import SIDES, Basis, load_bases
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.errors import UserError, check_choice, check_integer
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.replace import replace_linear, replace_module, to_linears
from sparsegrad.layers.rotated import BACKWARDS, SparseGradLinear
from sparsegrad.methods.base import (
    Context,
    Prepared,
    check_kept,
    count_trainable,
    freeze,
    kept_per_weight,
)
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.groups import param_groups
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.targets import Linears, weight_shapes

ENGINES = ("exact", "layer")
_DTYPES = {None: None, "bf16": torch.bfloat16}
# Settings of one engine only, with the value that the other leaves them at.
_OF_ENGINE: dict[str, dict[str, Any]] = {
    "layer": {"backward": "regular"},
    "exact": {
        "sides": "both", "moments": "dense", "release_gradients": False, "drop_padding": False, "save_dtype": None
    },
}  # fmt: skip


def calibrated_bases(
    model: nn.Module,
    linears: Linears,
    context: Context,
    steps: int,
    *,
    sides: str = "both",
    update: Callable[[], None] | None = None,
) -> tuple[dict[str, Basis], dict[str, Any]]:
    """The bases of all layer kinds and what they cost, from the store or from `steps` batches.

    A calibration that trains by `update` is never taken from the store: its updates would be missing.
    """
    mlp = {kind: list(found.values()) for kind, found in linears.items()}
    batches, progress = islice(context.batches(), steps), partial(tqdm, desc="calibration", leave=False)
    settings = {"steps": steps, **({} if sides == "both" else {"sides": sides})} if update is None else None
    return context.calibrated(
        settings, lambda: calibrate(model, batches, mlp, steps, sides=sides, update=update, progress=progress)
    )


@dataclass(frozen=True, kw_only=True)
class SparseGrad:
    """Top-k entries of the rotated gradient, Adam on them, AdamW on everything outside the MLP weights.

    Attributes:
        density: share of kept entries per weight and step, (0, 1]; or
        keep: their number.
        steps: calibration batches.
        engine: `exact` (rotation in the optimizer) or `layer` (the paper's `SparseGradLinear`); the same trajectory in
            exact arithmetic, but for accumulation: `exact` selects once per step, `layer` in every micro-batch.
        backward: of engine `layer`: `regular` or `sparse_dense`.
        sides: what engine `exact` rotates: `both` (the method), or one: `in`, `out`, `small`. Not exact, but the
            rotation costs a sixth (see docs/performance.md).
        moments: of engine `exact`: `dense` (the method's), or `support`: a tenth of their memory, not exact.
        release_gradients: update each MLP weight as soon as its gradient is there, and free that. Exact.
        drop_padding: leave padding out of the MLP weights' gradients, where it counts nothing. Exact.
        save_dtype: `bf16` keeps the MLP linears' inputs rounded until their weight gradient is made; null as they are.
        basis: file with stored bases to use instead of calibrating.
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
    basis: str | None = None
    name: str = "sparsegrad"

    def __post_init__(self) -> None:
        check_kept(self.density, self.keep)
        check_integer("method.steps", self.steps, at_least=1, remedy="the paper takes 30")
        check_choice("method.engine", self.engine, ENGINES)
        check_choice("method.backward", self.backward, BACKWARDS)
        check_choice("method.sides", self.sides, SIDES)
        check_choice("method.moments", self.moments, tuple(MOMENTS))
        check_choice("method.release_gradients", self.release_gradients, (True, False))
        check_choice("method.drop_padding", self.drop_padding, (True, False))
        check_choice("method.save_dtype", self.save_dtype, tuple(_DTYPES), "null keeps them as they are")
        for name, value in _OF_ENGINE["layer" if self.engine == "exact" else "exact"].items():
            if getattr(self, name) != value:
                raise UserError(
                    f"method.{name}={getattr(self, name)} does not belong to method.engine={self.engine}: "
                    f"set method.{name}={_shown(value)}, or the other engine"
                )

    def check(self, linears: Linears) -> None:
        """`keep` may not exceed a weight's size; a given basis file must fit the shapes."""
        kept_per_weight(linears, self.density, self.keep)
        if self.basis is not None:
            self._load(linears)

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        if self.release_gradients and context.accumulation > 1:
            raise UserError(
                f"method.release_gradients=true does not go with train.grad_accumulation={context.accumulation}: "
                "the gradients of several passes must meet; set one of them back"
            )
        freeze(model, linears, context, mlp_weights=True)
        bases, cost = self.find_bases(model, linears, context)
        return self.build(model, linears, context, bases, cost)

    def find_bases(
        self, model: nn.Module, linears: Linears, context: Context
    ) -> tuple[dict[str, Basis], dict[str, Any]]:
        """The bases of all layer kinds and what they cost: from the given file, the store, or calibration."""
        if self.basis is not None:
            return {kind: basis.only(self.sides) for kind, basis in self._load(linears).items()}, {"file": self.basis}
        return calibrated_bases(model, linears, context, self.steps, sides=self.sides)

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
        optimizer = SparseGradAdamW(
            self._groups(model, linears, bases), lr=context.lr, weight_decay=context.weight_decay, fused=True
        )
        if self.release_gradients:
            optimizer.release_gradients()
        return Prepared(
            optimizer=optimizer,
            trainable=trainable,
            trainable_per_weight=per_weight,
            calibration=cost,
            finish=lambda: to_linears(model),
        )

    @property
    def _replaces(self) -> bool:
        """Whether layers of ours stand in the places of the MLP linears while training."""
        return self.engine == "layer" or self.drop_padding or self.save_dtype is not None

    def _groups(self, model: nn.Module, linears: Linears, bases: Mapping[str, Basis]) -> list[dict[str, Any]]:
        if self.engine == "layer":
            return self._layer(model, linears, bases)
        groups = param_groups(model, linears, bases, keep=self.keep, density=self.density, moments=self.moments)
        if self._replaces:
            for found in linears.values():
                for name, linear in found.items():
                    lean = LeanLinear(linear, drop_padding=self.drop_padding, save_dtype=_DTYPES[self.save_dtype])
                    replace_module(model, name, lean)
        return groups

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
            if kind not in bases or not bases[kind].fits(shape):
                found = {name: basis.shape for name, basis in bases.items()}
                raise UserError(
                    f"method.basis={self.basis} holds bases for {found}, but the model's weights of kind {kind} "
                    f"are {shape}: name a basis of this model, or null to calibrate"
                )
        return bases


def _shown(value: Any) -> str:
    """A value as a YAML has it."""
    return "null" if value is None else str(value).lower()
