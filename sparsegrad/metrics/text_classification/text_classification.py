"""Scores of text classification and regression, as an `evaluate` module that needs no hub.

`evaluate.load(<this folder>, config_name)` loads it. It imports nothing of sparsegrad, because `evaluate` runs a copy.
"""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics

# The scores that each configuration computes.
CONFIGS = {
    "accuracy": ("accuracy",),
    "accuracy_f1": ("accuracy", "f1"),
    "matthews_correlation": ("matthews_correlation",),
    "pearson": ("pearson", "spearman"),
}
_REGRESSION = "pearson"


def accuracy(predictions: Any, references: Any) -> float:
    """Share of correct labels; both arguments (rows,) int."""
    return float(metrics.accuracy_score(references, predictions))


def f1(predictions: Any, references: Any) -> float:
    """F1 of label 1; both arguments (rows,) of 0 and 1; 0.0 if neither contains label 1."""
    return float(metrics.f1_score(references, predictions, zero_division=0))


def matthews_correlation(predictions: Any, references: Any) -> float:
    """Matthews correlation; both arguments (rows,) int; 0.0 if either is constant."""
    return float(metrics.matthews_corrcoef(references, predictions))


def pearson(predictions: Any, references: Any) -> float:
    """Linear correlation; both arguments (rows,) float; 0.0 with a warning if either is constant."""
    return 0.0 if _warn_if_constant(predictions, references) else float(stats.pearsonr(predictions, references)[0])


def spearman(predictions: Any, references: Any) -> float:
    """Rank correlation; both arguments (rows,) float; 0.0 if either is constant."""
    constant = np.ptp(predictions) == 0 or np.ptp(references) == 0  # `pearson` has warned already
    return 0.0 if constant else float(stats.spearmanr(predictions, references)[0])


def _warn_if_constant(predictions: Any, references: Any) -> bool:
    found = [name for name, values in (("predictions", predictions), ("labels", references)) if np.ptp(values) == 0]
    if found:
        warnings.warn(f"all {' and '.join(found)} are equal: correlation counted as 0", RuntimeWarning, stacklevel=2)
    return bool(found)


SCORES = {score.__name__: score for score in (accuracy, f1, matthews_correlation, pearson, spearman)}


class TextClassification(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """One configuration of `CONFIGS`; predictions and references are (rows,), int or (for `pearson`) float."""

    def _info(self) -> Any:
        if self.config_name not in CONFIGS:
            raise ValueError(f"config_name={self.config_name} is not allowed: choose one of {', '.join(CONFIGS)}")
        kind = datasets.Value("float64" if self.config_name == _REGRESSION else "int64")
        return evaluate.MetricInfo(
            description="Accuracy, F1, Matthews, Pearson and Spearman correlation of text classifiers.",
            citation="",
            inputs_description="predictions, references: one label id (or number) per row.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {name: SCORES[name](predictions, references) for name in CONFIGS[self.config_name]}
