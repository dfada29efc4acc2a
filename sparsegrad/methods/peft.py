"""Any method of the installed `peft` on the MLP linears: `method=peft` and the ready ones in conf/method/peft."""

from __future__ import annotations

import functools
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sparsegrad.calibration.loss import compute_loss
from sparsegrad.distributed import average_
from sparsegrad.errors import UserError, check_integer, fail
from sparsegrad.methods.base import Context, Prepared, adamw, freeze, set_trainable, trainable_parameters, widen_linear
from sparsegrad.methods.peft_config import (
    FROM_DATA,
    add_seed,
    check_apart,
    check_dtype,
    find_config_class,
    make_config,
    quiet,
    wrap,
)
from sparsegrad.methods.peft_save import find_trained, save_peft
from sparsegrad.methods.peft_size import (
    SIZE_PATTERNS,
    Weight,
    Weights,
    describe_weights,
    fit_budget,
    measure_size,
    size_field,
)
from sparsegrad.targets import Linears, all_linears


@dataclass(frozen=True, kw_only=True)
class Peft:
    """One method of peft on the linears that SparseGrad trains; W is frozen, and the rest trains as in every method.

    Attributes:
        config: peft's own fields for the method, with `peft_type`. Those that name targets are left out.
        budget: `density:SHARE`: the size (rank, number of entries, block size) with which the trainable count is
            closest to this share of the weights; None: as in `config`.
        steps: calibration batches of an initialisation from data (`lora_ga`).
        seed: of what the method draws once, such as projections; peft's default is the same for all seeds of a run.
    """

    config: Mapping[str, Any]
    budget: str | None = None
    steps: int | None = 8
    seed: int | None = None
    name: str = "peft"
    saves_peft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise fail("method.config", self.config, "give peft's fields", "such as method.config.peft_type=LORA")
        find_config_class(self.config)  # for its checks
        self._check_size()
        if self.steps is None and self.collects_gradients:
            raise fail(
                "method.steps", "null", f"{FROM_DATA} initialises from data", "give calibration batches, such as 8"
            )
        if self.steps is not None:
            check_integer("method.steps", self.steps, at_least=1)
        if self.seed is not None:
            check_integer("method.seed", self.seed, at_least=0)

    def _check_size(self) -> None:
        """Raise `UserError` if the budget is malformed, or a field sets a size beside it."""
        if self._read_budget() is None:
            return
        size = size_field(str(self.config["peft_type"]).upper())
        for field in (*filter(None, (size,)), *SIZE_PATTERNS):
            if field in self.config and (field == size or self.config[field]):  # an empty pattern sets nothing
                given = f"method.config.{field}={self.config[field]}"
                raise UserError(
                    f"{given} and method.budget={self.budget} both set the size: to keep {given}, add "
                    "method.budget=null; to keep the budget, leave the other out"
                )

    def _read_budget(self) -> float | None:
        """The share of `density:SHARE`."""
        if self.budget is None:
            return None
        kind, _, share = str(self.budget).partition(":")
        try:
            density = float(share)
        except ValueError:
            density = 0.0
        if kind != "density" or not 0 < density <= 1:
            raise fail(
                "method.budget", self.budget, "give density:SHARE with a share in (0, 1]", "such as density:0.01"
            )
        return density

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if peft cannot wrap these linears with these settings, or no size fits the budget."""
        for linear in all_linears(linears):
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"method={self.name} wraps nn.Linear, not {type(linear).__name__}: use method=sparsegrad"
                )
            check_dtype(self.config, linear.weight.dtype)
        self._describe(linears)

    @property
    def collects_gradients(self) -> bool:
        """See `Method`: whether the method initialises from calibration batches."""
        return bool(self.config.get("init_lora_weights") == FROM_DATA)

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        weights = describe_weights(linears)
        return sum(measure_size(self._resolve(weights)[0], weights, merge=False).counts.values())

    def _describe(self, linears: Linears) -> tuple[dict[str, Any], dict[str, Any]]:
        """All fields of the method; and what the record says of them."""
        weights = describe_weights(linears)
        fields, notes = self._resolve(weights)
        return fields, notes | {"peft": peft.__version__, "merges": measure_size(fields, weights).merges}

    def _resolve(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Any]]:
        """All fields of the method, with the size that the budget gives; and what that is."""
        fields, density = add_seed(self.config, self.seed), self._read_budget()
        if density is None:
            return fields, {}
        found = _fit_once(repr(fields), tuple(weights.items()), density)
        return fields | {found["field"]: found["value"]}, {"budget": found}

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        fields, notes = self._describe(linears)
        named = {name: linear for found in linears.values() for name, linear in found.items()}
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in named.items()}
        config = make_config(fields, shapes)
        before = next(iter(named.values())).weight.detach().clone()
        tuner, cost = self._insert(model, config, named, context)
        check_apart(tuner)
        adapters = {id(parameter) for parameter in tuner.parameters() if parameter.requires_grad}
        freeze(model, linears, context, mlp_weights=False)
        layers = {kind: [model.get_submodule(name) for name in found] for kind, found in linears.items()}
        for layer in chain.from_iterable(layers.values()):
            _train_adapter(layer, adapters)
        parameters = trainable_parameters(model)
        # An initialisation such as PiSSA's takes its part out of W, so the adapter does not fit the model as published.
        changes_base = not torch.equal(before, _base_weight(layers))
        # Of each linear, as a method may give those of one kind different sizes.
        counts = {kind: [_count_adapter(layer) for layer in found] for kind, found in layers.items()}
        cannot_save = context.train_rest or changes_base or find_trained(model)[1] is not None
        save = None if cannot_save else functools.partial(save_peft, model, tuner)
        return Prepared(
            optimizer=adamw(parameters, context),
            trainable=sum(parameter.numel() for parameter in parameters),
            trainable_per_weight={kind: round(sum(each) / len(each)) for kind, each in counts.items()},
            calibration=cost,
            finish=functools.partial(_merge, tuner) if notes["merges"] else lambda: None,
            save=save,
            notes=notes | self._describe_share(linears, sum(chain.from_iterable(counts.values())), notes),
        )

    def _describe_share(self, linears: Linears, count: int, notes: Mapping[str, Any]) -> dict[str, Any]:
        """The budget's note with the share that trains, which some methods decide only when they see the weights.

        Raises:
            UserError: if it is not within a factor of 2 of the budget.
        """
        density = self._read_budget()
        if density is None:
            return {}
        share = count / sum(linear.weight.numel() for linear in all_linears(linears))
        found = notes["budget"] | {"share": round(share, 6)}
        if not density / 2 <= share <= 2 * density:
            about = f"with {found['field']}={found['value']} the share is {share:.2g} of these weights"
            raise fail(
                "method.budget", self.budget, about, f"set it to null and method.config.{found['field']} by hand"
            )
        return {"budget": found}

    def _insert(
        self, model: nn.Module, config: Any, linears: Mapping[str, nn.Linear], context: Context
    ) -> tuple[BaseTuner, dict[str, Any]]:
        """Put peft's layers into the model; and what an initialisation from data cost."""
        if not self.collects_gradients:
            return wrap(model, config), {}

        def read_and_wrap() -> BaseTuner:
            _read_data(model, config, linears, context, self.steps)
            return wrap(model, config)

        return context.measure(read_and_wrap)


@functools.lru_cache(maxsize=16)
def _fit_once(config: str, weights: tuple[tuple[str, Weight], ...], density: float) -> dict[str, Any]:
    """`fit_budget`, whose result `check` and `prepare` both need; of what can be keys."""
    return fit_budget(literal_eval(config), dict(weights), density)


def _read_data(
    model: nn.Module, config: Any, linears: Mapping[str, nn.Linear], context: Context, steps: int | None
) -> None:
    """Let peft's LoRA-GA look at the gradients of calibration batches, the mean over all processes."""
    from peft.tuners.lora.loraga import preprocess_loraga  # of peft 0.19 and later; `find_config_class` has checked it

    device = next(model.parameters()).device

    def backward() -> None:
        for batch in islice(context.batches(), steps):
            compute_loss(model, batch, device).backward()  # type: ignore[no-untyped-call]

    with quiet():
        preprocess_loraga(model, config, train_step=backward)
    average_(getattr(linear, "_peft_loraga_grad") for linear in linears.values())  # noqa: B009 - a field of peft's


def _train_adapter(layer: nn.Module, adapters: set[int]) -> None:
    """Set what trains in one wrapped linear: what peft chose. The bias of the linear itself was set with the rest."""
    assert isinstance(layer, BaseTunerLayer)
    own = getattr(layer.get_base_layer(), "bias", None)
    for parameter in layer.parameters():
        if parameter is not own:
            set_trainable(parameter, id(parameter) in adapters)


def _count_adapter(layer: Any) -> int:
    own = getattr(layer.get_base_layer(), "bias", None)
    return sum(p.numel() for p in layer.parameters() if p.requires_grad and p is not own)


def _base_weight(layers: Mapping[str, list[Any]]) -> torch.Tensor:
    weight: torch.Tensor = next(iter(layers.values()))[0].get_base_layer().weight
    return weight


def _merge(tuner: BaseTuner) -> None:
    for layer in tuner.modules():
        if isinstance(layer, BaseTunerLayer):
            widen_linear(layer.get_base_layer())
    with quiet():
        tuner.merge_and_unload()
