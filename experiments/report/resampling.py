"""Scores of runs under resampled validation rows: every metric is a function of sums over rows, so one product with a
matrix of row counts gives its value in all draws at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsegrad.errors import UserError
from sparsegrad.runs.predictions import Arrays

Floats = NDArray[np.float64]

DRAWS = 10_000
SEED = 20_24  # of the resampled rows: fixed, so that the same records give the same tables
CHUNK = 1_000  # draws per product: 1,000 x 1,500 rows in float64 are 12 MB
POINTS = 100.0
LEAST_SPREAD = 0.25  # of predictions that have not collapsed: standard deviation over that of the labels; correlation
CLASSES = 2  # of the tasks that are scored by Matthews correlation


@functools.lru_cache(maxsize=8)
def row_counts(rows: int, draws: int = DRAWS) -> NDArray[np.uint8]:
    """How often each row occurs in each draw: (draws, rows); every line sums to `rows`.

    All runs with this number of rows share these draws, so that differences are between the same resampled rows.
    """
    generator = np.random.default_rng((SEED, rows))
    counts = np.empty((draws, rows), np.uint8)  # more than 255 of one row does not occur: the mean is 1
    for line in range(draws):
        counts[line] = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    counts.flags.writeable = False  # it is cached
    return counts


def scores(metric: str, runs: Sequence[Arrays]) -> Floats:
    """The metric of each run on all rows, in points (nll: as it is): (runs,).

    Raises:
        UserError: for an unknown metric, or runs with different labels.
    """
    sums, score = _sums(metric, runs)
    rows = sums.shape[1]
    return np.asarray(score(sums.sum(axis=1)[None] / rows)[0])


class Remembered(dict[str, Any]):
    """Predictions that remember their scores in the draws, for runs that take part in several comparisons."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays)
        self.draws: dict[tuple[str, int], Floats] = {}


def shared_rows(metric: str, arrays: Arrays) -> NDArray[Any]:
    """What runs that are paired have in common, one number for each row: its label, or its tokens."""
    return np.asarray(arrays[_shared_name(metric)])


def _shared_name(metric: str) -> str:
    return "tokens" if metric == "nll" else "label"


def score_draws(metric: str, runs: Sequence[Arrays], draws: int = DRAWS) -> Floats:
    """The metric of each run in each draw of rows: (draws, runs).

    Raises:
        UserError: for an unknown metric, or runs with different labels.
    """
    key = metric, draws
    new = [one for one in runs if not (isinstance(one, Remembered) and key in one.draws)]
    found = iter(_compute_draws(metric, new, draws).T if new else ())
    columns = []
    for one in runs:
        known = one.draws.get(key) if isinstance(one, Remembered) else None
        columns.append(next(found) if known is None else known)
        if isinstance(one, Remembered):
            one.draws[key] = columns[-1]
    return np.stack(columns, axis=1)


def _compute_draws(metric: str, runs: Sequence[Arrays], draws: int) -> Floats:
    sums, score = _sums(metric, runs)  # (runs, rows, sums)
    count, rows, width = sums.shape
    flat = np.ascontiguousarray(sums.transpose(1, 0, 2)).reshape(rows, count * width)
    counts = row_counts(rows, draws)
    found = np.empty((draws, count))
    for start in range(0, draws, CHUNK):
        part = counts[start : start + CHUNK].astype(np.float64) @ flat
        found[start : start + CHUNK] = score(part.reshape(-1, count, width) / rows)
    return found


def has_collapsed(metric: str, arrays: Arrays) -> bool:
    """Whether a run predicts one class, numbers that hardly differ, or a loss or number that is not finite.

    Numbers hardly differ if their standard deviation is below a quarter of the labels', and they correlate with the
    labels by less than a quarter: numbers that are only too small may still be well ordered.
    """
    if metric == "nll":
        return not bool(np.isfinite(arrays["nll"]).all())
    predicted = arrays["predicted"]
    if not np.isfinite(predicted).all():
        return True
    if metric == "pearson":
        numbers, labels = predicted.astype(np.float64), arrays["label"].astype(np.float64)
        score = abs(float(scores(metric, [arrays])[0])) / POINTS
        return bool(np.std(numbers) <= LEAST_SPREAD * np.std(labels) and score < LEAST_SPREAD)
    return bool(np.all(predicted == predicted[0]))


def _sums(metric: str, runs: Sequence[Arrays]) -> tuple[Floats, Callable[[Floats], Floats]]:
    """(per-row terms (runs, rows, terms), score of the means of these terms)."""
    if metric not in METRICS:
        raise UserError(f"metric={metric} has no statistics: it must be one of {', '.join(METRICS)}")
    first = shared_rows(metric, runs[0])
    if any(not np.array_equal(shared_rows(metric, one), first) for one in runs):
        raise UserError(f"these runs have different validation rows ({_shared_name(metric)}): they cannot be paired")
    terms, score = METRICS[metric]
    return np.stack([terms(one) for one in runs]), score


def _accuracy_terms(arrays: Arrays) -> Floats:
    return np.asarray(arrays["predicted"] == arrays["label"], np.float64)[:, None]


def _accuracy(means: Floats) -> Floats:
    return np.asarray(POINTS * means[..., 0])


def _matthews_terms(arrays: Arrays) -> Floats:
    """One indicator per cell of the confusion matrix: (rows, classes^2)."""
    label, predicted = arrays["label"].astype(int), arrays["predicted"].astype(int)
    return np.asarray(np.eye(CLASSES * CLASSES)[label * CLASSES + predicted], np.float64)


def _matthews(means: Floats) -> Floats:
    """0 where labels or predictions are constant, as in the records."""
    tn, fp, fn, tp = np.moveaxis(means, -1, 0)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    # Rounding of the means leaves products of about 1e-18 where a class is absent.
    safe = np.where(product > 1e-15, product, 1.0)
    return np.where(product > 1e-15, POINTS * (tp * tn - fp * fn) / np.sqrt(safe), 0.0)


def _pearson_terms(arrays: Arrays) -> Floats:
    # Centred first: the correlation does not change, and the differences of sums below lose fewer digits.
    x, y = (arrays[name].astype(np.float64) for name in ("predicted", "label"))
    x, y = x - x.mean(), y - y.mean()
    return np.stack([x, y, x * x, y * y, x * y], axis=-1)


def _pearson(means: Floats) -> Floats:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    product = (xx - x * x) * (yy - y * y)
    safe = np.where(product > 1e-15, product, 1.0)
    return np.where(product > 1e-15, POINTS * (xy - x * y) / np.sqrt(safe), 0.0)


def _nll_terms(arrays: Arrays) -> Floats:
    return np.stack([arrays["nll"], arrays["tokens"]], axis=-1).astype(np.float64)


def _nll(means: Floats) -> Floats:
    return np.asarray(means[..., 0] / means[..., 1])


METRICS: dict[str, tuple[Callable[[Arrays], Floats], Callable[[Floats], Floats]]] = {
    "accuracy": (_accuracy_terms, _accuracy),
    "matthews_correlation": (_matthews_terms, _matthews),
    "pearson": (_pearson_terms, _pearson),
    "nll": (_nll_terms, _nll),
}
LOWER_IS_BETTER = frozenset({"nll"})
