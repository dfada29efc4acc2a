"""Sampler adaptive_grid: a logarithmic grid that extends beyond an edge winner, and else narrows around the winner.

The first trials are the points of the grid, from its middle outwards, so that the pruner soon has good runs to compare
with. Every later trial depends on those before it:

- The best value is the smallest or largest one tried, an *edge winner*: the next trial is one step of the grid beyond.
- Of equal values, that of the earliest trial counts as the best.
- Otherwise: the geometric mean of the best value and its neighbour across the wider gap; of two equal gaps, the one
  whose neighbour scored better.
- No trial has a score, as all diverged or were pruned: one step below the smallest value.
- An extension ends 8 steps beyond the grid. From there, the next trial is the geometric mean of the edge and its
  neighbour.

So every study of a plan has the same number of trials, and an extension is paid from that budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from sparsegrad.errors import UserError
from sparsegrad.sweeps.ledger import Ledger, find_first_best, read_ledger, read_score
from sparsegrad.sweeps.space import Dimension, Space

NAME = "adaptive_grid"
_REACH = 8  # steps of the grid that an extension may go, at most
_SAME_GAP = 0.01  # relative; values are rounded to three digits


def check_space(space: Space) -> None:
    """Raise `UserError` unless the space is one float range with log and points."""
    one = space.dimensions[0]
    if len(space.dimensions) != 1 or one.kind != "float" or not one.log or one.points is None:
        raise UserError(
            f"sweep.sampler={NAME} searches exactly one range with log and points, not {space.plain()}: give "
            "sweep.space={train.lr:{float:[1e-5,1e-2],log:true,points:4}}, or choose another sampler"
        )


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution, wide enough for extensions of the grid."""
    one = space.dimensions[0]
    reach = find_ratio(one) ** _REACH
    low, high = one.values
    return {one.key: FloatDistribution(low / reach, high * reach, log=True)}


def first_values(dimension: Dimension) -> list[float]:
    """Return the points of the grid, from the middle outwards; of two equally far ones the smaller first."""
    points = [_round(value) for value in dimension.grid]
    middle = (len(points) - 1) / 2
    return [points[index] for index in sorted(range(len(points)), key=lambda index: (abs(index - middle), index))]


def find_ratio(dimension: Dimension) -> float:
    """Return the factor between neighbouring points of the grid."""
    low, high = dimension.values
    assert dimension.points is not None
    return float((high / low) ** (1 / (dimension.points - 1)))


def next_value(
    tried: Mapping[float, float | None], ratio: float, bounds: tuple[float, float] = (0.0, math.inf)
) -> float:
    """Return the value of the next trial after the grid; the module docstring has the rule.

    Args:
        tried: value -> score, higher is better, in the order of the trials; None: pruned, diverged or still running.
        ratio: the step of the grid.
        bounds: the smallest and the largest value that an extension may reach.
    """
    values = sorted(tried)
    best = find_best(tried)
    at = 0 if best is None else values.index(best)
    best = values[at]
    if at == 0 and (below := max(_round(best / ratio), bounds[0])) < best * (1 - _SAME_GAP):
        return below
    if at == len(values) - 1 and (above := min(_round(best * ratio), bounds[1])) > best * (1 + _SAME_GAP):
        return above
    neighbours = [values[other] for other in (at - 1, at + 1) if 0 <= other < len(values)]
    return _round(math.sqrt(best * _choose_neighbour(tried, best, neighbours)))


def _choose_neighbour(tried: Mapping[float, float | None], best: float, neighbours: list[float]) -> float:
    """The neighbour across the wider gap; of two equal gaps, the one with the better score."""
    below, above = neighbours[0], neighbours[-1]
    gap_below, gap_above = abs(math.log(best / below)), abs(math.log(above / best))
    if math.isclose(gap_below, gap_above, rel_tol=_SAME_GAP):
        return below if _rank(tried[below]) >= _rank(tried[above]) else above
    return below if gap_below > gap_above else above


def find_best(tried: Mapping[float, float | None]) -> float | None:
    """Return the value with the best score, of equal ones that tried first; None if there is no score."""
    best = find_first_best(list(tried.values()))
    return None if best is None else list(tried)[best]


class AdaptiveGrid(BaseSampler):
    """The sampler; its state is the study's trials alone, so that every worker continues it alike."""

    def __init__(self, space: Space) -> None:
        self._space, self._dimension = space, space.dimensions[0]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the searched key."""
        return distributions(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the value of the trial's slot."""
        ledger = read_ledger(study)
        slot, grid, key = ledger.slot(trial.number), first_values(self._dimension), self._dimension.key
        if slot < len(grid):
            return {key: grid[slot]}
        tried = dict(self._find_tried(study, ledger, slot))
        limits = search_space[key]
        assert isinstance(limits, FloatDistribution)
        return {key: next_value(tried, find_ratio(self._dimension), (limits.low, limits.high))}

    def _find_tried(self, study: Study, ledger: Ledger, slots: int) -> Iterator[tuple[float, float | None]]:
        """(value, score) of each of the first slots, in their order."""
        for slot in range(slots):
            attempts, key = ledger.attempts(slot), self._dimension.key
            # The first attempt has no value if its worker died before it was stored.
            if values := [one.params[key] for one in attempts if key in one.params]:
                yield values[0], read_score(attempts[-1], study.direction)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: the only key is sampled relatively."""
        raise AssertionError(f"{param_name} is not in the grid")


def _rank(score: float | None) -> float:
    return -math.inf if score is None else score


def _round(value: float) -> float:
    """Round to three digits: rates that can be read, and typed again."""
    return float(f"{value:.3g}")
