"""The checked configuration of a sweep, and the configuration of one trial from its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution

from sparsegrad.errors import UserError, check_choice, check_integer, check_number, fail, first_line
from sparsegrad.metrics import metric_config
from sparsegrad.metrics.text_classification.text_classification import CONFIGS
from sparsegrad.runs.config import BESIDE_RUN, RunConfig, build
from sparsegrad.runs.keys import determining, flatten
from sparsegrad.runs.names import with_current_names
from sparsegrad.runs.overrides import check_fields, list_given
from sparsegrad.sweeps import adaptive_grid
from sparsegrad.sweeps.hparams import set_values
from sparsegrad.sweeps.search_way import describe_pruner
from sparsegrad.sweeps.space import Space, parse_space

SAMPLERS = ("tpe", "gp", "qmc", "random", "grid", adaptive_grid.NAME)
PRUNERS = ("none", "median", "hyperband", "patience")
OBJECTIVES = ("heldout", "validation")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The `sweep` node of the configuration; conf/sweep/custom.yaml explains each value."""

    name: str
    study: str
    storage: str
    overwrite: bool
    trials: int
    workers: int
    device_share: float | None
    sampler: str
    seed: int
    startup_trials: int
    pruner: str
    pruner_startup_trials: int
    pruner_warmup: int
    pruner_patience: int
    objective: str
    metric: str | None
    direction: str
    heartbeat: float
    retries: int
    worker: int | None
    runner: str
    space: Any

    def __post_init__(self) -> None:
        check_choice("sweep.sampler", self.sampler, SAMPLERS)
        check_choice("sweep.pruner", self.pruner, PRUNERS)
        check_choice("sweep.objective", self.objective, OBJECTIVES)
        check_choice("sweep.direction", self.direction, ("maximize", "minimize"))
        check_choice("sweep.overwrite", self.overwrite, (True, False))
        for name in ("trials", "workers", "startup_trials", "pruner_patience"):
            check_integer(f"sweep.{name}", getattr(self, name), at_least=1)
        for name in ("seed", "pruner_startup_trials", "pruner_warmup", "retries"):
            check_integer(f"sweep.{name}", getattr(self, name), at_least=0)
        if self.device_share is not None:
            remedy = "use for example 0.25: four trials on one device"
            check_number("sweep.device_share", self.device_share, above=0, at_most=1, remedy=remedy)
        self._check_worker()
        if (self.sampler, self.pruner) == ("grid", "hyperband"):
            raise fail("sweep.pruner", "hyperband", "choose none, median or patience for sweep.sampler=grid")
        check_number("sweep.heartbeat", self.heartbeat, above=0, remedy="seconds; 15 is common")
        if not isinstance(self.storage, str) or not self.storage.strip():
            raise fail("sweep.storage", self.storage, "give a file or URL", "see docs/sweeps.md")

    def _check_worker(self) -> None:
        if self.worker is None:
            return
        check_integer("sweep.worker", self.worker, at_least=0, remedy="sweep.worker=range(4) starts four")
        if self.overwrite:
            remedy = "delete the study first, with one command without sweep.worker"
            raise fail("sweep.overwrite", True, "workers of one launch would delete each other's study", remedy)

    @property
    def lease(self) -> float:
        """Seconds without a heartbeat after which a worker is considered dead."""
        return 4 * self.heartbeat


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep that has passed all checks that need no storage.

    Attributes:
        sweep: its settings.
        space: the searched keys.
        composed: the configuration that Hydra composed.
        base: the run with the values that are not searched.
    """

    sweep: SweepConfig
    space: Space
    composed: DictConfig
    base: RunConfig

    @property
    def metric(self) -> str:
        """The score that is optimized."""
        return self.sweep.metric or self.base.task.main_metric

    @property
    def budget(self) -> int:
        """Number of trials to finish: `sweep.trials`, or the points of the grid if they are fewer."""
        return min(self.sweep.trials, len(self.space.grid())) if self.sweep.sampler == "grid" else self.sweep.trials

    @property
    def is_adaptive(self) -> bool:
        """Whether the trials after the grid depend on all those before them."""
        return self.sweep.sampler == adaptive_grid.NAME

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Key -> Optuna's distribution, of which every trial's value is a part."""
        return adaptive_grid.distributions(self.space) if self.is_adaptive else self.space.distributions

    @property
    def ordered_from(self) -> int | None:
        """The first slot that is given only when all earlier ones are finished; None: there is none."""
        return self.space.dimensions[0].points if self.is_adaptive else None

    def trial_config(self, parameters: Mapping[str, Any]) -> RunConfig:
        """Build the run of one trial.

        Raises:
            UserError: if the configuration does not allow a value.
        """
        return build(_set_values(self.composed, self.sweep, parameters))

    def identity(self) -> dict[str, Any]:
        """Return what all trials of a study share; a study of another identity is not continued."""
        fixed = flatten(determining(self.base.resolved))
        for key in self.space.distributions:
            fixed.pop(key, None)  # searched, so different in each trial
        return {
            "space": self.space.plain(),
            "direction": self.sweep.direction,
            "metric": self.metric,
            "objective": self.sweep.objective,
            "fixed": fixed,
            # They decide what an adaptive grid tries; other sweeps can be given more trials, or another pruner, later.
            **({"budget": self.budget, **self.way} if self.is_adaptive else {}),
        }

    @property
    def way(self) -> dict[str, Any]:
        """How the trials are chosen and stopped, as in the summary of a study."""
        pruner = describe_pruner(vars(self.sweep))
        return {"sampler": self.sweep.sampler, "pruner": pruner, "space": self.space.plain()}


def make_plan(composed: DictConfig) -> SweepPlan:
    """Check a composed configuration that has a `sweep` node.

    Raises:
        UserError: if a value is not allowed, or a key cannot be searched.
    """
    composed = with_current_names(composed)  # earlier names are accepted
    sweep = _make_sweep_config(composed)
    base = build(_set_values(composed, sweep, {}))
    space = parse_space(sweep.space, base.resolved)
    if sweep.sampler == adaptive_grid.NAME:
        adaptive_grid.check_space(space)
    _check_overrides(space)
    _check_metric(sweep, base)
    plan = SweepPlan(sweep=sweep, space=space, composed=composed, base=base)
    # Build what the sweep will need, so that mistakes show before the first trial.
    for probe in space.probes():
        plan.trial_config(probe)
    runner(sweep)
    if sweep.sampler == "grid":
        space.grid()
    return plan


def runner(sweep: SweepConfig) -> Callable[..., Any]:
    """Import what runs a trial: a callable like `sparsegrad.runs.run`.

    Raises:
        UserError: if it cannot be imported.
    """
    module, _, name = str(sweep.runner).rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"sweep.runner={sweep.runner} cannot be imported ({error}): give the dotted path of a function"
        ) from None
    return found


def _make_sweep_config(composed: DictConfig) -> SweepConfig:
    try:
        node: Any = OmegaConf.to_container(composed.sweep, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"sweep cannot be resolved ({first_line(error)}): correct the sweep node") from None
    check_fields(SweepConfig, node, "sweep", "sweep")
    try:
        return SweepConfig(**node)
    except TypeError as error:
        what = str(error).replace("SweepConfig.__init__()", "").strip()
        raise UserError(f"sweep does not fit: {what}; conf/sweep/custom.yaml lists its keys") from None


def _set_values(composed: DictConfig, sweep: SweepConfig, parameters: Mapping[str, Any]) -> DictConfig:
    """Return the run's part of the configuration, with a trial's values and the split that the sweep optimizes."""
    config = composed.copy()
    # A copy may drop the nodes that are no part of a run, such as `sweep`.
    OmegaConf.set_struct(config, False)
    for name in set(BESIDE_RUN) - {"evidence"}:  # the protocol of a plan refers to `evidence`; `build` drops it
        config.pop(name, None)
    set_values(config, parameters)
    config.name = sweep.study
    if config.protocol.select != sweep.objective:
        # Tables group by the protocol's name: it must not name a split that did not choose the checkpoint.
        config.protocol.name = f"{config.protocol.name}-{sweep.objective}"
        config.protocol.select = sweep.objective
    return config


def _check_overrides(space: Space) -> None:
    """Refuse a key that is both searched and set, by hand or by Hydra's multirun."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    twice = sorted(list_given() & set(space.distributions))
    if twice:
        who = "Hydra's multirun" if hydra.mode == RunMode.MULTIRUN else "the command line"
        raise UserError(f"{twice[0]} is set by {who} and searched by the sweep: drop one of the two")


def _check_metric(sweep: SweepConfig, base: RunConfig) -> None:
    language = base.task.is_language
    if language and sweep.direction == "maximize":
        raise fail(
            "sweep.direction", "maximize", f"{base.task.name} is scored by a loss, which is better lower: use minimize"
        )
    if sweep.metric is not None:
        given = ("nll", "perplexity", "loss") if language else (*CONFIGS[metric_config(base.task)], "loss")
        check_choice("sweep.metric", sweep.metric, given, f"these are the scores of {base.task.name}")
