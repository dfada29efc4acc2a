"""What a record contains of the Trainer's log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsegrad.metrics.language import LANGUAGE_SCORES
from sparsegrad.metrics.text_classification.text_classification import CONFIGS
from sparsegrad.tasks.base import Task
from sparsegrad.trainer.trainer import VALIDATION

Log = list[dict[str, Any]]
_SCORES = {"loss", *LANGUAGE_SCORES, *(name for names in CONFIGS.values() for name in names)}


def history(log: Log) -> dict[str, Any]:
    """Return every evaluation, and the curve of the training loss."""
    losses = [{"step": row["step"], "loss": _drop_nonfinite(row["loss"])} for row in log if "loss" in row]
    watched = evaluations(log, VALIDATION)
    return {"evaluations": evaluations(log), **({"validations": watched} if watched else {}), "losses": losses}


def evaluations(log: Log, prefix: str = "eval") -> Log:
    """Return step, epoch and scores of the evaluations whose scores have `prefix`."""
    rows = [row for row in log if any(name.startswith(f"{prefix}_") for name in row)]
    return [{"step": row["step"], "epoch": round(row["epoch"], 4), **scores_of(row, prefix)} for row in rows]


def best_on_validation(log: Log, task: Task) -> dict[str, Any]:
    """Return the best score on the validation split, if evaluations computed it; it does not choose the checkpoint."""
    seen = [row for row in evaluations(log, VALIDATION) if row.get(task.main_metric) is not None]
    if not seen:
        return {}
    best = (max if task.greater_is_better else min)(seen, key=lambda row: float(row[task.main_metric]))
    return {"best_on_validation": {"value": best[task.main_metric], "step": best["step"]}}


def scores_of(row: Mapping[str, Any], prefix: str = "eval") -> dict[str, Any]:
    """Return the loss and what the metric computed in an evaluation, without the Trainer's timings."""
    found = {name.removeprefix(f"{prefix}_"): value for name, value in row.items() if name.startswith(f"{prefix}_")}
    return {name: _drop_nonfinite(value) for name, value in found.items() if name in _SCORES}


def _drop_nonfinite(value: float) -> float | None:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return value if math.isfinite(value) else None
