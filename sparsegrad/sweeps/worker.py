"""One worker: takes trials until the study has all it was asked for."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState
from rich.console import Console

from sparsegrad.errors import BusyError, UserError
from sparsegrad.runs.config import RunConfig
from sparsegrad.sweeps.config import runner
from sparsegrad.sweeps.leases import Heartbeat, TrialLostError
from sparsegrad.sweeps.ledger import CRASHED, FAILURE, MISTAKE, REASON, REDO_OF, STOPPED
from sparsegrad.sweeps.reporter import Reporter
from sparsegrad.sweeps.study import SharedStudy

console = Console(highlight=False)
_LONGEST_WAIT = 5.0


class Worker:
    """Runs trials of one study, one after the other."""

    def __init__(self, shared: SharedStudy, labels: Mapping[str, Any] | None = None) -> None:
        self.shared, self.labels = shared, dict(labels or {})
        self._run: Callable[..., Any] = runner(shared.plan.sweep)
        self._pause = min(_LONGEST_WAIT, shared.plan.sweep.heartbeat / 2)

    def work(self) -> None:
        """Take trials until none is left.

        Raises:
            UserError: for a mistake that every trial would meet, or a storage that went away.
        """
        gc.freeze()  # what imports made stays: collecting after each trial need not look at it
        try:
            while not self.shared.is_finished():
                trial = self.shared.take()
                if trial is None:
                    time.sleep(self._pause)  # others are at work on the last trials; one of them may yet die
                else:
                    self._attempt(trial)
        except StorageInternalError as error:
            where = self.shared.store.shown
            raise UserError(f"the storage {where} went away ({error}): the same command continues") from None

    def _attempt(self, trial: Trial) -> None:
        """Run one trial to whatever end it comes to."""
        close = self.shared.close
        try:
            with Heartbeat(trial, self.shared.plan.sweep.heartbeat) as heartbeat:
                state, value, facts = self._outcome(trial, heartbeat)
        except TrialLostError:
            self._say(trial, "given to another worker")
            return
        except KeyboardInterrupt:
            close(trial, TrialState.FAIL, {FAILURE: STOPPED, REASON: "stopped by the user"})
            raise
        except UserError as error:
            close(trial, TrialState.FAIL, {FAILURE: MISTAKE, REASON: str(error)})
            raise
        except Exception as error:
            self._crashed(trial, error)
            raise
        finally:
            self._tidy()
        close(trial, state, facts, value)
        self._say(trial, facts.get(REASON) or f"{self.shared.plan.metric} {value:.4f}")

    def _outcome(self, trial: Trial, heartbeat: Heartbeat) -> tuple[TrialState, float | None, dict[str, Any]]:
        """How a trial ends for the study: its state, its value, and what is noted with it."""
        config = self.shared.plan.trial_config(trial.params)
        reporter = Reporter(trial, self.shared.plan.metric, heartbeat)
        try:
            record = self._patient_run(config, trial, reporter)
        except torch.OutOfMemoryError:
            return TrialState.PRUNED, None, {REASON: "out of device memory"}
        except UserError:
            reason = _why_failed(config, self._label(trial))
            if reason is None:
                raise
            return TrialState.PRUNED, _last_value(self.shared, trial), {REASON: reason}
        value = _value(record, self.shared.plan.metric)
        facts = {"record": str(config.record_path)}
        if value is None:
            return TrialState.PRUNED, None, facts | {REASON: f"{self.shared.plan.metric} is not a number"}
        return TrialState.COMPLETE, value, facts

    def _patient_run(self, config: RunConfig, trial: Trial, reporter: Reporter) -> dict[str, Any]:
        """Run; or wait for another worker that drew the very same values, and take its record."""
        labels = {**self.labels, "sweep": self._label(trial)}
        while True:
            try:
                record: dict[str, Any] = self._run(config, callbacks=[reporter], labels=labels)[0]
            except BusyError:
                reporter.on_step_end()
                time.sleep(self._pause)
            else:
                return record

    def _label(self, trial: Trial) -> dict[str, Any]:
        sweep, plan = self.shared.plan.sweep, self.shared.plan
        label = {"study": sweep.study, "trial": trial.number, "metric": plan.metric, "objective": sweep.objective}
        redo = trial.user_attrs.get(REDO_OF)
        return label if redo is None else label | {REDO_OF: redo}

    def _crashed(self, trial: Trial, error: Exception) -> None:
        """Note a programming error; the trial is tried again by the next worker, but not forever."""
        plan, deaths = self.shared.plan, self.shared.ledger().deaths(trial.number)
        state = TrialState.FAIL if deaths < plan.sweep.retries else TrialState.PRUNED
        self.shared.close(trial, state, {FAILURE: CRASHED, REASON: f"{type(error).__name__}: {error}"[:500]})

    def _tidy(self) -> None:
        """Give memory back before the next model is loaded."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _say(self, trial: Trial, what: str) -> None:
        budget = self.shared.plan.budget
        done = len(self.shared.ledger().finished(budget))
        values = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        console.print(f"trial {trial.number} ({values}): {what} [{done} of {budget}]", markup=False, soft_wrap=True)


def _why_failed(config: RunConfig, label: Mapping[str, Any]) -> str | None:
    """The reason in the failed record that this trial left; None if it failed before it trained."""
    try:
        record = json.loads(config.record_path.read_text())
    except (OSError, ValueError):
        return None
    mine = record.get("status") == "failed" and record.get("sweep", {}) == label
    return str(record.get("reason", "failed")) if mine else None


def _last_value(shared: SharedStudy, trial: Trial) -> float | None:
    """The last evaluation that was reported: the value of a pruned trial."""
    values = shared.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    return values[max(values)] if values else None


def _value(record: Mapping[str, Any], metric: str) -> float | None:
    """The score of the chosen checkpoint on the split that chose it."""
    chosen = next(row for row in record["evaluations"] if row["step"] == record["result"]["chosen_step"])
    value = chosen.get(metric)
    return value if value is not None and math.isfinite(value) else None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
