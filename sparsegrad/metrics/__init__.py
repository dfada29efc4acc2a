"""Scores for the Trainer, computed from logits and labels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsegrad.errors import DIVERGED, FailedRunError, fail
from sparsegrad.metrics.language import language_metrics
from sparsegrad.metrics.text_classification.text_classification import CONFIGS, TextClassification
from sparsegrad.tasks.base import Task

if TYPE_CHECKING:  # importing transformers takes seconds, and only the name is needed
    from transformers import EvalPrediction

# The argument of `evaluate.load(str(METRIC_FOLDER), config_name)`.
METRIC_FOLDER = Path(__file__).parent / "text_classification"


def metric_config(task: Task) -> str:
    """Return the metric module's configuration for `task`: `task.metric`, or the first that computes its main metric.

    Raises:
        UserError: if the configuration is unknown, or does not compute the task's main metric.
    """
    config = task.metric or next((name for name, scores in CONFIGS.items() if task.main_metric in scores), "")
    if task.main_metric not in CONFIGS.get(config, ()):
        known = "; ".join(f"{name}: {', '.join(scores)}" for name, scores in CONFIGS.items())
        raise fail(
            "task.main_metric",
            task.main_metric,
            f"choose a score that task.metric={config or 'null'} computes ({known})",
        )
    if (config == "pearson") != task.is_regression:
        raise fail(
            "task.main_metric",
            task.main_metric,
            "choose pearson or spearman for a regression, another score for other tasks",
        )
    if "f1" in CONFIGS[config] and len(task.labels) != 2:
        needs = f"F1 needs two labels, and {task.name} has {len(task.labels)}"
        if task.main_metric == "f1":
            raise fail("task.main_metric", "f1", needs, "use task.main_metric=accuracy task.metric=accuracy")
        raise fail("task.metric", config, needs, "use task.metric=accuracy")
    return config


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the Trainer's `compute_metrics`: logits (rows, num_labels) and labels (rows,) -> scores.

    For a language task, the function expects what `sparsegrad.metrics.language.token_losses` returns.

    Raises:
        FailedRunError: from the returned function, if the model predicts NaN or infinity.
    """
    if task.is_language:
        return language_metrics
    config = metric_config(task)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        guesses = _make_predictions(task, np.asarray(logits[0] if isinstance(logits, tuple) else logits))
        # Not by `evaluate.load`: it would ask the network, and copy the module to a folder that all processes share.
        with tempfile.TemporaryDirectory() as folder:  # it makes one even in memory, and the cache may be read-only
            metric = TextClassification(config_name=config, keep_in_memory=True, cache_dir=folder)
            scores = metric.compute(predictions=guesses, references=np.asarray(prediction.label_ids).reshape(-1))
        return dict(scores)

    return compute


def _make_predictions(task: Task, logits: Any) -> Any:
    """Convert logits (rows, num_labels) to label ids (rows,), or for a regression to numbers (rows,)."""
    bad = int((~np.isfinite(logits)).reshape(len(logits), -1).any(axis=1).sum())
    if bad:
        raise FailedRunError(
            f"the model predicts NaN or infinity for {bad} of {len(logits)} rows of {task.name}: training has "
            f"{DIVERGED}; lower train.lr, or use train.precision=fp32"
        )
    return logits.reshape(len(logits)).astype(np.float64) if task.is_regression else logits.argmax(axis=-1)
