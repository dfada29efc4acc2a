"""Tells a study how a run goes, and ends the run that is not worth its time."""

from __future__ import annotations

import math
from typing import Any

from optuna.trial import Trial
from transformers import TrainerCallback

from sparsegrad.errors import UserError
from sparsegrad.sweeps.leases import Heartbeat

PROGRESS = "progress"


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports each evaluation on the split that chooses; ends a run by `UserError`, which leaves a failed record.

    Evaluations are numbered 1, 2, 3, ...: the number of a step would mean another share of the run for each batch size.
    """

    def __init__(self, trial: Trial, metric: str, heartbeat: Heartbeat) -> None:
        self._trial, self._metric, self._heartbeat = trial, metric, heartbeat
        self._reported = 0
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report what a checkpoint brings along."""
        self._training = True
        self._report(state)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop if the trial is another's by now."""
        self._heartbeat.check()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report; the evaluation after the training is another split's."""
        if not self._training:
            return
        self._report(state)
        if state.global_step < state.max_steps and self._trial.should_prune():
            raise UserError(f"pruned by the sweep after evaluation {self._reported}, step {state.global_step}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Nothing more to report."""
        self._training = False

    def _report(self, state: Any) -> None:
        values = [row[f"eval_{self._metric}"] for row in state.log_history if f"eval_{self._metric}" in row]
        for value in values[self._reported :]:
            self._reported += 1
            if not math.isfinite(value):
                raise UserError(f"{self._metric} is not a number at evaluation {self._reported}")
            self._trial.report(value, self._reported)
        if values:
            self._trial.set_user_attr(PROGRESS, [state.global_step, state.max_steps])
