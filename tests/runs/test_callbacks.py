"""The clock leaves evaluation out, and a loss that is no number is reported with its step."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from process_group import together

from sparsegrad.distributed import rank
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


def bad_step(steps: list[list[float]], log_every: int, start: int = 0) -> int | None:
    """The step that a `LossWatch` names when it sees steps of these micro-batch losses."""
    watch = LossWatch()
    for step, losses in enumerate(steps, 1):
        for loss in losses:
            watch.add(torch.tensor(loss))
        control = SimpleNamespace(should_log=step % log_every == 0, should_evaluate=False, should_save=False)
        try:
            watch.on_step_end(None, SimpleNamespace(global_step=start + step), control)
        except NonFiniteLossError as error:
            return int(str(error).rsplit(" ", 1)[1])  # what the user reads
    return None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (4, 1)])  # 4, 1: epochs of 5 micro-batches, accumulation 4
@pytest.mark.parametrize("log_every", [1, 5, 10])
@pytest.mark.parametrize("start", [0, 40])
def test_the_first_bad_step_is_named(bad: float, sizes: tuple[int, ...], log_every: int, start: int) -> None:
    counts = [sizes[step % len(sizes)] for step in range(20)]
    for step, count in enumerate(counts):
        for micro_batch in range(count):
            losses = [[1.0] * one for one in counts]
            losses[step][micro_batch] = bad
            assert bad_step(losses, log_every, start) == start + step + 1


def test_finite_losses_raise_nothing() -> None:
    assert bad_step([[1.0, 0.0], [-3.0, 1e30]] * 5, 5) is None
    assert bad_step([[]], 1) is None


def watch_two(bad: dict[int, int]) -> tuple[str, bool]:
    """What one of several processes is told when its loss of a step is NaN; `bad`: process -> step."""
    own, watch = bad.get(rank()), LossWatch()
    for step in range(1, 11):
        watch.add(torch.tensor(float("nan") if step == own else 1.0))
        control = SimpleNamespace(should_log=step % 5 == 0, should_evaluate=False, should_save=False)
        try:
            watch.on_step_end(None, SimpleNamespace(global_step=step), control)
        except NonFiniteLossError as error:
            return str(error), error.silent
    return "", False


def test_a_bad_loss_of_one_process_is_named_by_all_and_printed_once() -> None:
    """Otherwise the others would wait for it, and lose the connection."""
    for bad, step in (({1: 3}, 3), ({0: 9, 1: 8}, 8), ({}, None)):
        text = "" if step is None else f"the loss is not a finite number at step {step}"
        assert together(2, watch_two, bad) == [(text, False), (text, step is not None)]


def flow(step: int, max_steps: int, should_evaluate: bool) -> Any:
    control = SimpleNamespace(should_evaluate=should_evaluate, should_save=should_evaluate, should_log=False)
    EvaluationSteps().on_step_end(None, SimpleNamespace(global_step=step, max_steps=max_steps), control)
    return control.should_evaluate, control.should_save, control.should_log


def test_the_last_step_is_evaluated_saved_and_logged() -> None:
    assert flow(7, 7, should_evaluate=False) == (True, True, True)
    assert flow(5, 7, should_evaluate=False) == (False, False, False)
    assert flow(5, 7, should_evaluate=True) == (True, True, True)
