"""Report the evaluations of a run to its study, and stop the run if the study prunes it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from optuna.trial import Trial
from transformers import TrainerCallback

from sparsegrad.errors import FailedRunError
from sparsegrad.runs.records import PRUNED
from sparsegrad.sweeps.leases import Heartbeat
from sparsegrad.sweeps.storage import patiently

PROGRESS = "progress"


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports each evaluation on the split that chooses; stops a run by a `FailedRunError`: its record says why.

    Evaluations are numbered 1, 2, 3, ... for the pruner. Step numbers would not be comparable, because the number of
    steps in a run depends on its batch size.

    Attributes:
        has_begun: whether the training has begun.
    """

    def __init__(self, trial: Trial, metric: str, heartbeat: Heartbeat) -> None:
        self._trial, self._metric, self._heartbeat = trial, metric, heartbeat
        self._reported = 0
        self._training = self.has_begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the evaluations that a checkpoint contains."""
        self._training = self.has_begun = True
        self._report_new(state)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop if the trial was given to another worker."""
        self._heartbeat.check()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report and prune; the evaluation after training is on another split."""
        if not self._training:
            return
        self._report_new(state)
        if state.global_step < state.max_steps and self._trial.should_prune():
            raise FailedRunError(f"{PRUNED} after evaluation {self._reported}, step {state.global_step}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop reporting."""
        self._training = False

    def _report_new(self, state: Any) -> None:
        # The log of the Trainer contains every evaluation, also those before a checkpoint was resumed.
        values = [row[f"eval_{self._metric}"] for row in state.log_history if f"eval_{self._metric}" in row]
        for value in values[self._reported :]:
            self._reported += 1
            if not math.isfinite(value):
                raise FailedRunError(f"{self._metric} is not a number at evaluation {self._reported}")
            patiently(partial(self._trial.report, value, self._reported), self._heartbeat.lease)
        if values:
            steps = [state.global_step, state.max_steps]
            patiently(partial(self._trial.set_user_attr, PROGRESS, steps), self._heartbeat.lease)
