"""The clock leaves evaluation out, and a loss that is no number is reported with its step."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsegrad.trainer import callbacks
from sparsegrad.trainer.callbacks import WARM_UP_STEPS, EvaluationSteps, LossWatch, NonFiniteLossError, Stopwatch
from sparsegrad.trainer.peak_memory import PeakMemory


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(callbacks, "time", made)
    return made


def test_only_steps_are_timed(clock: Clock) -> None:
    watch = Stopwatch(PeakMemory(torch.device("cpu")))
    clock.now += 50  # loading
    watch.on_train_begin()
    for step in range(WARM_UP_STEPS + 10):
        clock.now += 0.5 if step >= WARM_UP_STEPS else 9  # the first steps are slow
        watch.on_step_end()
        if step % 4 == 3:
            clock.now += 1
            watch.on_log()
            clock.now += 30
            watch.on_evaluate()
            clock.now += 20  # rows that are watched besides
            watch.on_predict()
            clock.now += 7
            watch.on_save()
    assert watch.report() == {"steps_per_second": 2.0, "timed_steps": 10, "timed_seconds": 5.0}


def test_a_run_of_few_steps_has_no_speed(clock: Clock) -> None:
    watch = Stopwatch(PeakMemory(torch.device("cpu")))
    watch.on_train_begin()
    for _ in range(WARM_UP_STEPS):
        clock.now += 1
        watch.on_step_end()
    assert watch.report()["steps_per_second"] is None


def test_a_resumed_run_counts_the_times_of_earlier_processes(clock: Clock) -> None:
    first = Stopwatch(PeakMemory(torch.device("cpu")))
    clock.now += 50  # loading
    first.on_train_begin()
    for _ in range(WARM_UP_STEPS + 10):
        clock.now += 0.5
        first.on_step_end()
    stored = json.loads(json.dumps(first.state()))
    clock.now += 10_000  # nothing runs
    again = Stopwatch(PeakMemory(torch.device("cpu")))
    again.restore(stored)
    clock.now += 20
    again.on_train_begin()
    clock.now += 9
    again.on_step_end()  # not timed, so this process alone would have no speed
    assert again.report() == {"steps_per_second": 2.0, "timed_steps": 10, "timed_seconds": 5.0}
    assert again.run_seconds() == 50 + 0.5 * (WARM_UP_STEPS + 10) + 29
    again.restore(None)  # a checkpoint of an earlier version
    assert again.run_seconds() is again.state()["run_seconds"] is None


def bad_step(losses: list[float], accumulation: int, log_every: int, start: int = 0) -> int | None:
    """The step that a `LossWatch` names when it sees these micro-batch losses."""
    watch, args = LossWatch(), SimpleNamespace(gradient_accumulation_steps=accumulation)
    for number, loss in enumerate(losses, 1):
        watch.add(torch.tensor(loss))
        step, rest = divmod(number, accumulation)
        if rest == 0 and step % log_every == 0:
            try:
                watch.on_log(args, SimpleNamespace(global_step=start + step), None)
            except NonFiniteLossError as error:
                return int(str(error).rsplit(" ", 1)[1])  # what the user reads
    return None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("log_every", [1, 5, 10])
@pytest.mark.parametrize("start", [0, 40])
def test_the_first_bad_step_is_named(bad: float, accumulation: int, log_every: int, start: int) -> None:
    for micro_batch in range(20 * accumulation):
        losses = [1.0] * (20 * accumulation)
        losses[micro_batch] = bad
        expected = start + micro_batch // accumulation + 1
        assert bad_step(losses, accumulation, log_every, start) == expected


def test_finite_losses_raise_nothing() -> None:
    assert bad_step([1.0, 0.0, -3.0, 1e30] * 5, 2, 5) is None
    LossWatch().on_log(SimpleNamespace(gradient_accumulation_steps=1), SimpleNamespace(global_step=0), None)


def flow(step: int, max_steps: int, should_evaluate: bool) -> Any:
    control = SimpleNamespace(should_evaluate=should_evaluate, should_save=should_evaluate, should_log=False)
    EvaluationSteps().on_step_end(None, SimpleNamespace(global_step=step, max_steps=max_steps), control)
    return control.should_evaluate, control.should_save, control.should_log


def test_the_last_step_is_evaluated_saved_and_logged() -> None:
    assert flow(7, 7, should_evaluate=False) == (True, True, True)
    assert flow(5, 7, should_evaluate=False) == (False, False, False)
    assert flow(5, 7, should_evaluate=True) == (True, True, True)
