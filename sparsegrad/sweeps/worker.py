"""One worker: runs trials until the study is finished."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from sparsegrad import progress
from sparsegrad.errors import BusyError, FailedRunError, ResourceError, UserError, first_line
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.records import find_complete, run_seconds
from sparsegrad.sweeps.base_run import can_start
from sparsegrad.sweeps.config import runner
from sparsegrad.sweeps.leases import Heartbeat, TrialLostError
from sparsegrad.sweeps.ledger import CRASHED, FAILURE, MISTAKE, REASON, RECORD_SECONDS, REDO_OF, STOPPED
from sparsegrad.sweeps.packing import Packing
from sparsegrad.sweeps.reporter import Reporter
from sparsegrad.sweeps.storage import is_unavailable, patiently, unavailable
from sparsegrad.sweeps.study import SharedStudy
from sparsegrad.trainer.checkpoints import has_checkpoint
from sparsegrad.trainer.signals import StopOnSignal

_MAX_PAUSE = 5.0  # seconds between the first looks at a study that has no free trial
_MAX_IDLE = 30.0  # seconds between later looks
Outcome = tuple[TrialState, float | None, dict[str, Any]]
"""State of a trial, its value, and facts to store with it."""


class Worker:
    """Runs trials of one study, one after the other.

    Args:
        shared: the study.
        labels: are stored in the record of each trial.
    """

    def __init__(self, shared: SharedStudy, labels: Mapping[str, Any] | None = None) -> None:
        self.shared, self.labels = shared, dict(labels or {})
        self._run: Callable[..., Any] = runner(shared.plan.sweep)
        self._packing = Packing(shared.plan)
        self._source = ""  # of the last trial's score, if it was not run here
        self._pause = min(_MAX_PAUSE, shared.plan.sweep.heartbeat / 2)

    def work(self) -> None:
        """Run trials until the study is finished.

        Raises:
            UserError: for a mistake that would affect every trial, or if the storage becomes unavailable.
        """
        gc.freeze()  # imported objects live forever: the collections after each trial can skip them
        try:
            with show_trials(self.shared) as bar:
                self._run_trials(bar)
        except Exception as error:
            if not is_unavailable(error):
                raise
            raise unavailable(error, self.shared.plan.sweep.storage) from None

    def _run_trials(self, bar: progress.Job) -> None:
        """Run trials until the study is finished; while others run the last ones, wait: one of them may still fail."""
        shared, lease = self.shared, self.shared.plan.sweep.lease
        pause, finished = self._pause, shared.finished()
        while len(finished) < shared.plan.budget:
            trial = shared.take()
            if trial is None:
                time.sleep(pause)
                pause = min(1.5 * pause, _MAX_IDLE)  # many idle workers should not read the study all the time
                finished = patiently(shared.finished, lease)
            else:
                what = self._run_trial(trial)
                finished, pause = patiently(shared.finished, lease), self._pause
                self._print_trial(trial, what, len(finished))
            update_trials(bar, shared, finished)

    def _run_trial(self, trial: Trial) -> str:
        """Run one trial and close it in the study; what happened, in words."""
        close, sweep, self._source = self.shared.close, self.shared.plan.sweep, ""
        try:
            with Heartbeat(trial, sweep.heartbeat, sweep.lease) as heartbeat:
                state, value, facts = self._find_outcome(trial, heartbeat)
        except TrialLostError:
            return "given to another worker"
        except KeyboardInterrupt:
            close(trial, TrialState.FAIL, {FAILURE: STOPPED, REASON: "stopped by the user"})
            raise
        except UserError as error:
            close(trial, TrialState.FAIL, {FAILURE: MISTAKE, REASON: str(error)})
            raise
        except Exception as error:
            self._close_crashed(trial, error)
            raise
        finally:
            self._free_memory()
        patiently(lambda: close(trial, state, facts, value), sweep.lease)
        return facts.get(REASON) or f"{self.shared.plan.metric} {value:.4f}{self._source}"

    def _find_outcome(self, trial: Trial, heartbeat: Heartbeat) -> Outcome:
        """Run the configuration of a trial."""
        reporter = Reporter(trial, self.shared.plan.metric, heartbeat)
        config: RunConfig | None = None
        try:
            config = self.shared.plan.trial_config(trial.params)
            record, is_new = self._run_admitted(config, trial, reporter)
        except torch.OutOfMemoryError:
            return self._find_outcome_of_full_memory(trial, config)
        except ResourceError:
            raise  # of this machine, not of the values
        except UserError as error:
            # A run that failed in training left a record: its values are poor.
            facts = {} if config is None else _read_failure(config, self._make_label(trial))
            if isinstance(error, FailedRunError) and not facts:  # with force=true an earlier, complete record stays
                facts = {REASON: str(error)}
            if facts:
                return TrialState.PRUNED, _find_last_value(self.shared, trial), facts
            if not self._is_of_values(trial, reporter):
                raise
            return TrialState.PRUNED, None, {FAILURE: MISTAKE, REASON: str(error)}
        return self._read_outcome(config, record, is_new)

    def _find_outcome_of_full_memory(self, trial: Trial, config: RunConfig | None) -> Outcome:
        if config is None or not has_checkpoint(config.checkpoints):
            return TrialState.PRUNED, None, {REASON: "out of device memory"}
        # It has fitted before, so another program may hold the memory: tried again, as after a crash.
        facts = {FAILURE: CRASHED, REASON: "out of device memory, where it trained before"}
        return self._count_crash(trial), None, facts

    def _read_outcome(self, config: RunConfig, record: dict[str, Any], is_new: bool) -> Outcome:
        """The outcome of a run that was completed, by this call or by an earlier one."""
        self.shared.check_content(record)
        value = _read_score(record, self.shared.plan.metric)
        # Not stored in the study: only this call found the run done.
        self._source = "" if is_new else f", from record {config.record_path}"
        facts = {"record": str(config.record_path), **_read_seconds(record)}
        if value is None:
            return TrialState.PRUNED, None, facts | {REASON: f"{self.shared.plan.metric} is not a number"}
        return TrialState.COMPLETE, value, facts

    def _is_of_values(self, trial: Trial, reporter: Reporter) -> bool:
        """Whether the refusal of a trial is due to its values; other refusals would affect every trial.

        Many checks need the model, so that `make_plan` cannot try them on the ends of each range.
        """
        if reporter.has_begun:  # no check, but for example a full disk
            return False
        self._free_memory()
        plan, waiting = self.shared.plan, Waiting(trial, reporter, self._pause)
        with self._packing.admitted(plan.base, waiting.pause):
            return can_start(plan, self._run)

    def _run_admitted(self, config: RunConfig, trial: Trial, reporter: Reporter) -> tuple[dict[str, Any], bool]:
        """Run the trial when its device has room and no other worker runs its values; the record, and if it is new."""
        labels = {**self.labels, "sweep": self._make_label(trial)}
        run = partial(self._run, config, callbacks=[reporter], labels=labels)
        waiting, is_alone = Waiting(trial, reporter, self._pause), False
        while True:
            try:
                if find_complete(config.record_path) is not None:  # nothing will be trained
                    return cast(tuple[dict[str, Any], bool], run())
                with self._packing.admitted(config, waiting.pause, alone=is_alone):
                    return cast(tuple[dict[str, Any], bool], run())
            except BusyError:  # its memory is reserved by the worker that runs it
                waiting.pause("waits for another worker, which runs the same values")
            except torch.OutOfMemoryError:
                if is_alone or not self._packing.is_shared:
                    raise
                # The estimate of this trial, or of one beside it, was too low. What does not fit alone is too large.
                is_alone = True
            self._free_memory()

    def _make_label(self, trial: Trial) -> dict[str, Any]:
        sweep, plan = self.shared.plan.sweep, self.shared.plan
        label = {"study": sweep.study, "trial": trial.number, "metric": plan.metric, "objective": sweep.objective}
        redo = trial.user_attrs.get(REDO_OF)
        return label if redo is None else label | {REDO_OF: redo}

    def _close_crashed(self, trial: Trial, error: Exception) -> None:
        """Close a trial after a programming error; it is tried again, but at most `sweep.retries` times."""
        # One line, as the reasons of other trials: it is a field of a table.
        facts = {FAILURE: CRASHED, REASON: f"{type(error).__name__}: {first_line(error)}"[:500]}
        self.shared.close(trial, self._count_crash(trial), facts)

    def _count_crash(self, trial: Trial) -> TrialState:
        """The state of a crashed trial: FAIL, to be tried again, but at most `sweep.retries` times."""
        deaths = self.shared.ledger().deaths(trial.number)
        return TrialState.FAIL if deaths < self.shared.plan.sweep.retries else TrialState.PRUNED

    def _free_memory(self) -> None:
        """Free memory before the next model is loaded."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _print_trial(self, trial: Trial, what: str, done: int) -> None:
        values = ", ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in trial.params.items()
        )
        progress.remark(f"trial {trial.number} ({values}): {what} [{done} of {self.shared.plan.budget}]")


class Waiting:
    """Waits with a trial, and says once why."""

    def __init__(self, trial: Trial, reporter: Reporter, seconds: float) -> None:
        self._trial, self._reporter, self._seconds, self._is_said = trial, reporter, seconds, False

    def pause(self, reason: str) -> None:
        """Wait for some seconds; a signal that ends the process returns the trial to the study first.

        Raises:
            TrialLostError: if the trial was given to another worker.
        """
        if not self._is_said:
            progress.remark(f"trial {self._trial.number} {reason}")
        self._is_said = True
        self._reporter.on_step_end()
        with StopOnSignal().listening():
            time.sleep(self._seconds)


@contextmanager
def show_trials(shared: SharedStudy) -> Iterator[progress.Job]:
    """Show the finished trials of a study and the best score so far; `update_trials` counts anew."""
    finished = shared.finished()
    with progress.job("trials", shared.plan.budget, unit="trials", done=len(finished)) as bar:
        update_trials(bar, shared, finished)
        yield bar


def update_trials(bar: progress.Job, shared: SharedStudy, finished: Sequence[FrozenTrial]) -> None:
    """Show the finished trials, also those of other workers."""
    values = [trial.value for trial in finished if trial.state == TrialState.COMPLETE and trial.value is not None]
    best = (max if shared.plan.sweep.direction == "maximize" else min)(values, default=None)
    bar.update(done=len(finished), note=None if best is None else f"best {best:.4f}")


def _read_failure(config: RunConfig, label: Mapping[str, Any]) -> dict[str, Any]:
    """Read reason and time from the failed record of this trial; empty if it failed before training."""
    try:
        record = json.loads(config.record_path.read_text())
    except (OSError, ValueError):
        return {}
    mine = record.get("status") == "failed" and record.get("sweep", {}) == label
    return {REASON: str(record.get("reason", "failed")), **_read_seconds(record)} if mine else {}


def _read_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """The time of a run: a trial that found its record, or that continued a stopped one, took less itself."""
    spent = run_seconds(record)
    return {} if spent is None else {RECORD_SECONDS: spent}


def _find_last_value(shared: SharedStudy, trial: Trial) -> float | None:
    """Return the last reported evaluation, the value of a pruned trial; None if there is none."""
    values = shared.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    return values[max(values)] if values else None


def _read_score(record: Mapping[str, Any], metric: str) -> float | None:
    """Return the score of the chosen checkpoint on the split that chose it; None if it is not finite."""
    chosen = next(row for row in record["evaluations"] if row["step"] == record["result"]["chosen_step"])
    value = chosen.get(metric)
    return value if value is not None and math.isfinite(value) else None
