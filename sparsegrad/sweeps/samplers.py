"""The samplers and pruners of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from sparsegrad.sweeps import adaptive_grid
from sparsegrad.sweeps.config import SweepConfig, SweepPlan
from sparsegrad.sweeps.ledger import read_ledger
from sparsegrad.sweeps.space import Space


class PerTrial(BaseSampler):
    """A new sampler for each trial, seeded by the study's seed and the trial's slot.

    With one seed for all workers, they would draw the same values at the same time. With one stream per worker, the
    trials would depend on which worker asks first. With the trial's number, they would depend on how many trials were
    repeated before.

    Args:
        make: slot and seed of a trial -> its sampler.
        seed: the study's.
    """

    def __init__(self, make: Callable[[int, int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._current: tuple[int, BaseSampler] | None = None

    def _sampler_for(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if self._current is None or self._current[0] != trial.number:
            slot = read_ledger(study).slot(trial.number)
            state = np.random.SeedSequence([self._seed, slot]).generate_state(1)
            self._current = trial.number, self._make(slot, int(state[0]))
        return self._current[1]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See Optuna."""
        return self._sampler_for(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See Optuna."""
        return self._sampler_for(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See Optuna."""
        return self._sampler_for(study, trial).sample_independent(study, trial, param_name, param_distribution)


class GridBySlot(BaseSampler):
    """Gives each slot of the study its own point of the grid, so that every point is tried exactly once."""

    def __init__(self, space: Space) -> None:
        self._space, self._points = space, space.grid()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all keys."""
        return self._space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the point of the trial's slot; a surplus trial, which will not run, gets any point."""
        slot = read_ledger(study).slot(trial.number)
        return dict(self._points[slot % len(self._points)])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: all keys are in the grid."""
        raise AssertionError(f"{param_name} is not in the grid")


class _Sobol(QMCSampler):
    """Optuna's QMC sampler with the space known from the start, and the point of the trial's slot.

    The original waits for a first finished trial, and counts points in the storage: a repeated trial would use up one.
    """

    def __init__(self, space: Space, slot: int, seed: int, independent: BaseSampler) -> None:
        super().__init__(
            scramble=True,
            seed=seed,
            independent_sampler=independent,
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
        self._slot = slot
        self._known = {one.key: one.distribution for one in space.dimensions if one.kind != "choice"}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the ranges; choices are drawn independently."""
        return self._known

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._slot


def make_sampler(plan: SweepPlan) -> BaseSampler:
    """Create the sampler of `sweep.sampler`."""
    return sampler(plan.sweep.sampler, plan.space, plan.sweep.seed, plan.sweep.startup_trials)


def sampler(name: str, space: Space, seed: int, startup_trials: int) -> BaseSampler:
    """Create the sampler `name` over `space`; the first `startup_trials` of tpe and gp are random."""
    makers: Mapping[str, Callable[[int, int], BaseSampler]] = {
        # Constant liar: running trials count as poor, so that parallel workers spread out.
        "tpe": lambda _, seed: TPESampler(seed=seed, n_startup_trials=startup_trials, constant_liar=True),
        "gp": lambda _, seed: GPSampler(seed=seed, n_startup_trials=startup_trials, warn_independent_sampling=False),
        "random": lambda _, seed: RandomSampler(seed=seed),
        # The study's seed, not the trial's: all trials are points of one scrambled sequence.
        "qmc": lambda slot, own: _Sobol(space, slot, seed, RandomSampler(seed=own)),
        "grid": lambda *_: GridBySlot(space),
        adaptive_grid.NAME: lambda *_: adaptive_grid.AdaptiveGrid(space),
    }
    return PerTrial(makers[name], seed)


def make_pruner(sweep: SweepConfig) -> BasePruner:
    """Create the pruner of `sweep.pruner`; its steps are the evaluations of a run: 1, 2, 3, ..."""
    if sweep.pruner == "median":
        # Evaluations are numbered from 1, so that n_warmup_steps = w + 1 never prunes the first w.
        return MedianPruner(n_startup_trials=sweep.pruner_startup_trials, n_warmup_steps=sweep.pruner_warmup + 1)
    if sweep.pruner == "hyperband":
        return HyperbandPruner(min_resource=max(1, sweep.pruner_warmup), max_resource="auto")
    if sweep.pruner == "patience":
        return PatientPruner(None, patience=sweep.pruner_patience)
    return NopPruner()
