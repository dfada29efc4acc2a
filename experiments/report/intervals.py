"""Intervals, p-values and power of a mean whose noise is partly known and partly estimated from a few seeds.

The noise of the rows is known from thousands of draws, so its quantile is the normal one. The variance between seeds
has few degrees of freedom, so its quantile is Student's t, unless rows dominate so clearly that it hardly matters. One
t quantile for the sum, with the degrees of freedom that Satterthwaite estimates, is too small where the seeds dominate:
seeds that agree by chance make the variance small and the degrees of freedom many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, ndtri, stdtrit

from experiments.report.resampling import Floats

LEVEL = 0.95
POWER = 0.8
_SMALLEST_P = 1e-12
_TINY = np.finfo(float).tiny
_CHANCES = (np.arange(1000) + 0.5) / 1000


@dataclass(frozen=True)
class Noise:
    """The variance of a mean over seeds, by its sources.

    Attributes:
        rows: from the choice of rows, where all seeds err alike.
        seeds: between seeds, estimated from them.
        least: what rows alone explain of `seeds`. It is known well: three seeds that agree better do so by chance.
        df: degrees of freedom of `seeds`.
    """

    rows: float
    seeds: float
    least: float
    df: float

    @property
    def se(self) -> float:
        """The standard error."""
        return math.sqrt(self.rows + max(self.seeds, self.least))

    def half_width(self, comparisons: int = 1) -> float:
        """Half of the 95 % interval; of one of several comparisons, all of which hold together (Bonferroni)."""
        return float(half_width((1 - LEVEL) / comparisons, self.rows, self.seeds, self.least, self.df))

    def p(self, value: float) -> float:
        """Two-sided p-value of a mean: the level whose interval ends at 0."""

        def excess(log_level: float) -> float:
            return float(half_width(math.exp(log_level), self.rows, self.seeds, self.least, self.df)) - abs(value)

        lowest = math.log(_SMALLEST_P)
        return _SMALLEST_P if excess(lowest) <= 0 else math.exp(brentq(excess, lowest, 0.0))

    def detectable(self, comparisons: int = 1) -> float:
        """The true difference that is found in 80 % of repetitions, if the variances are as estimated.

        Repetitions estimate the variance between seeds anew; `_CHANCES` are the quantiles of these estimates.
        """
        true, spread = max(self.seeds, self.least), gammaincinv(self.df / 2, _CHANCES) / (self.df / 2)
        widths = half_width((1 - LEVEL) / comparisons, self.rows, true * spread, self.least, self.df)

        def surplus(difference: float) -> float:
            found = ndtr((difference - widths) / self.se) + ndtr((-difference - widths) / self.se)
            return float(np.mean(found)) - POWER

        return float(brentq(surplus, 0.0, float(widths.max()) + 6 * self.se))


def half_width(
    level: float, rows: float | Floats, seeds: float | Floats, least: float | Floats, df: float | Floats
) -> Floats:
    """Half of the interval that misses with probability `level`; the arguments are those of `Noise`."""
    normal, student = ndtri(level / 2) ** 2, stdtrit(df, level / 2) ** 2
    # Without the last factor, intervals cover too often where rows dominate. Its power is chosen by simulation: with a
    # smaller one, corrected tests of several comparisons find differences of equal arms too often.
    doubt = (student - normal) * seeds * (1 - (rows / np.maximum(rows + seeds, _TINY)) ** 4)
    return np.asarray(np.sqrt(np.maximum(normal * (rows + seeds) + doubt, normal * (rows + least))))


def average(parts: Sequence[Noise]) -> Noise:
    """The noise of the mean of independent tasks."""
    share = 1 / len(parts) ** 2
    seeds = np.array([part.seeds for part in parts])
    return Noise(
        rows=share * sum(part.rows for part in parts),
        seeds=share * float(seeds.sum()),
        least=share * sum(part.least for part in parts),
        df=float(pooled_df(seeds, [part.df for part in parts])),
    )


def pooled_df(seeds: Floats, df: Sequence[float]) -> Floats:
    """Degrees of freedom of the sum of variances between seeds (tasks, ...), each with its `df`.

    Tasks lend each other degrees of freedom only as far as they are as noisy as the noisiest one, and as if all had the
    fewest seeds: those few may agree by chance. Satterthwaite's estimate is larger, and too large where the seeds of
    one task scatter much more than those of the others.
    """
    largest = seeds.max(axis=0)
    return np.where(largest > 0, min(df) * seeds.sum(axis=0) / np.where(largest > 0, largest, 1.0), min(df))


def split(by_seed: Floats, drawn: Floats) -> Noise:
    """The noise of the mean over seeds of one task.

    Args:
        by_seed: (seeds,) values on all rows.
        drawn: (draws, seeds) values on resampled rows.
    """
    seeds = len(by_seed)
    centre = drawn.mean(axis=1)
    # Seeds answer single rows differently. That noise is between seeds as well, so it is taken out of the rows.
    least = float(np.var(drawn - centre[:, None], axis=0).sum()) / (seeds - 1) / seeds
    rows = max(0.0, float(np.var(centre)) - least)
    return Noise(rows=rows, seeds=float(np.var(by_seed, ddof=1)) / seeds, least=least, df=seeds - 1)
