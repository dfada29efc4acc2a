"""Mean, standard deviation and confidence interval of a difference, from few seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats


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


def welch_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Two-sided Welch confidence interval of mean(a) - mean(b), for unequal variances.

    None if a side has fewer than two values, or if neither side varies: then the variance cannot be estimated.
    """
    # Equal constants on both sides would give an interval of width 0, which is no certainty.
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side may have equal values: its variance is 0
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return float(interval.low), float(interval.high)
