"""Statistics of few seeds and many validation rows: summaries, paired differences with intervals, and corrections.

The paired comparison has two levels. Rows are resampled (`resampling.py`): the same rows for both arms and all seeds.
Seeds are too few for that: three seeds have ten distinct resamples, and percentile intervals from them cover about
80 % instead of 95 %. So the variance between seeds is estimated directly and its few degrees of freedom enter the
quantile (`intervals.py`). A simulation in the tests checks the coverage.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy import stats

from experiments.report.intervals import LEVEL, Noise, average, split
from experiments.report.plans import MIN_SEEDS as MIN_SEEDS
from experiments.report.resampling import DRAWS, Floats, score_draws, scores
from sparsegrad.runs.predictions import Arrays

Seeded = Mapping[int, Arrays]
"""Seed -> predictions of one arm on one task."""


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (None for fewer than two values) and count."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread}"


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean, standard deviation and count; None for no values, because a cell without seeds is missing, not zero."""
    if not values:
        return None
    return Summary(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def interquartile_mean(values: Sequence[float]) -> float | None:
    """Mean of the middle half of the values; None for no values.

    A value that straddles a quartile counts with the share of it that is inside: of three values the outer ones count
    a quarter of the middle one.
    """
    if not values:
        return None
    edges = np.linspace(0.0, 1.0, len(values) + 1)
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float(np.average(np.sort(values), weights=inside))


def welch_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Two-sided 95 % Welch confidence interval of mean(a) - mean(b), for unequal variances.

    None if a side has fewer than two values, or if neither side varies: then the variance cannot be estimated.
    """
    # Equal constants on both sides would give an interval of width 0, which is no certainty.
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side may have equal values: its variance is 0
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(LEVEL)
    return float(interval.low), float(interval.high)


def paired_interval(gains: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences (Student's t), for one of several comparisons (Bonferroni).

    None for fewer than two values, or if they do not vary: then the variance cannot be estimated.
    """
    if len(set(gains)) < 2:
        return None
    half = float(stats.t.ppf(_upper(comparisons), len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    return mean(gains) - half, mean(gains) + half


@dataclass(frozen=True)
class Difference:
    """A difference of two arms, or the score of one, with its uncertainty.

    Attributes:
        value: the difference, in points (nll: as it is).
        noise: its variance by source; None without an interval.
        seeds: fewest paired seeds of any task.
        left_out: seeds that only one of the arms has, summed over tasks.
        tasks: tasks that count.
        min_seeds: fewest seeds of an interval.
    """

    value: float
    noise: Noise | None
    seeds: int
    left_out: int
    tasks: tuple[str, ...]
    min_seeds: int = MIN_SEEDS

    @property
    def has_seeds(self) -> bool:
        """Whether there are enough seeds for an interval."""
        return self.seeds >= self.min_seeds

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None for too few seeds, or if nothing varies."""
        return self.interval_of(1)

    def interval_of(self, comparisons: int) -> tuple[float, float] | None:
        """The interval of one of several comparisons, all of which hold together with 95 % confidence (Bonferroni)."""
        if self.noise is None:
            return None
        half = self.noise.half_width(comparisons)
        return self.value - half, self.value + half

    @property
    def p(self) -> float | None:
        """Two-sided p-value of no difference; None without an interval."""
        return None if self.noise is None else self.noise.p(self.value)

    def detectable(self, comparisons: int = 1) -> float | None:
        """Minimal detectable difference: the true one that this comparison finds in 80 % of repetitions.

        Of several comparisons it is the first that Holm's procedure looks at, whose level is 0.05 / comparisons: the
        later ones find smaller differences.
        """
        return None if self.noise is None else self.noise.detectable(comparisons)


def _upper(comparisons: int) -> float:
    """Share of a distribution below the upper end of a two-sided interval."""
    return 1 - (1 - LEVEL) / 2 / comparisons


@dataclass(frozen=True)
class _TaskPart:
    """One task of a comparison: value, and the noise of its mean; None for too few seeds."""

    value: float
    noise: Noise | None
    seeds: int
    left_out: int


def compare(
    metrics: Mapping[str, str],
    a: Mapping[str, Seeded],
    b: Mapping[str, Seeded] | None = None,
    min_seeds: int = MIN_SEEDS,
    draws: int = DRAWS,
) -> Difference | None:
    """The paired difference a - b, averaged over tasks; without `b`, the average score of a.

    Args:
        metrics: task -> metric; these tasks count.
        a, b: task -> seed -> predictions. Seeds that are not in both arms are left out.
        min_seeds: fewest common seeds of an interval, at least `MIN_SEEDS`.
        draws: resamples of the rows.

    Returns:
        None if a task has no common seed. No interval if a task has fewer than `min_seeds`.

    Tasks count as independent: a seed means other batches and another dropout in each of them.
    """
    parts = [_compare_task(metric, a.get(task, {}), None if b is None else b.get(task, {}), draws)
             for task, metric in metrics.items()]  # fmt: skip
    found = [part for part in parts if part is not None]
    if not found or len(found) < len(parts):
        return None
    seeds, noises = min(part.seeds for part in found), [part.noise for part in found if part.noise is not None]
    noise = average(noises) if seeds >= min_seeds and len(noises) == len(found) else None
    return Difference(
        value=mean(part.value for part in found),
        noise=noise if noise is not None and noise.se > 0 else None,
        seeds=seeds,
        left_out=sum(part.left_out for part in found),
        tasks=tuple(metrics),
        min_seeds=min_seeds,
    )


def _compare_task(metric: str, a: Seeded, b: Seeded | None, draws: int) -> _TaskPart | None:
    """One task; None without a common seed."""
    common = sorted(a if b is None else set(a) & set(b))
    if not common:
        return None
    runs = [a[seed] for seed in common] + ([] if b is None else [b[seed] for seed in common])
    by_seed = _differences(scores(metric, runs)[None], len(common))
    left_out = 0 if b is None else len(set(a) ^ set(b))
    value = float(by_seed.mean())
    if len(common) < MIN_SEEDS:
        return _TaskPart(value, None, len(common), left_out)
    drawn = _differences(score_draws(metric, runs, draws), len(common))
    return _TaskPart(value, split(by_seed[0], drawn), len(common), left_out)


def _differences(values: Floats, seeds: int) -> Floats:
    """(lines, runs) -> (lines, seeds): the first arm's runs minus the second's, if there are two."""
    first, second = values[:, :seeds], values[:, seeds:]
    return first - second if second.shape[1] else first


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down procedure, in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def adjust(found: Mapping[str, Difference | None]) -> dict[str, float]:
    """Key -> p-value adjusted for all comparisons of a table; those without one are left out."""
    p_values = {name: one.p for name, one in found.items() if one is not None and one.p is not None}
    return dict(zip(p_values, holm([p for p in p_values.values() if p is not None]), strict=True))
