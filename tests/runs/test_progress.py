"""Progress: one line that fits the terminal, plain lines in a log file, nothing if quiet; the time left is right."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sparsegrad import progress
from sparsegrad.progress import Job, compose, format_seconds, job, remark, say, silence, track
from sparsegrad.trainer import callbacks
from sparsegrad.trainer.callbacks import Progress


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A stderr that is a terminal or a file."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        """What stays visible: a carriage return goes back to the start of the line, as ours always clears it."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(callbacks, "time", made)
    monkeypatch.setattr(progress, "_display", progress._Display())
    monkeypatch.setattr(progress.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    return made


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`show(terminal)`: a stderr of that kind."""
    monkeypatch.setenv(progress.QUIET, "0")  # not deleted: what `silence` sets must be undone after the test
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")

    def made(terminal: bool) -> Screen:
        screen = Screen(terminal)
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setattr("sys.stdout", screen)
        return screen

    return made


def run_three_minutes(clock: Clock) -> None:
    with job("trials", 3, unit="trials") as outer:
        for trial in range(3):
            for _ in track(range(60), "training", unit="steps"):
                clock.now += 1.0
            outer.update(done=trial + 1, note=f"best 0.{trial}")


def interrupt(clock: Clock) -> None:
    clock.now += 100
    raise KeyboardInterrupt


def test_without_a_screen_at_all_nothing_is_shown(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a daemon, or after `2>&-`."""
    monkeypatch.setenv(progress.QUIET, "0")  # it is set to 1 where nothing can be written
    monkeypatch.setattr("sys.stderr", None)
    run_three_minutes(clock)


def test_a_log_file_gets_a_plain_line_every_30_seconds(clock: Clock, show: Any) -> None:
    screen = show(terminal=False)
    run_three_minutes(clock)
    text = screen.getvalue()
    assert not re.search(r"[\r\x1b]", text)
    lines = text.splitlines()
    assert len(lines) == 180 / progress.EVERY + 1
    assert all(re.fullmatch(r"trials \d/3, .* \| training \d+/60, .* left.*", line) for line in lines[:5])
    assert lines[-1] == "trials: 3 trials in 3 min 0 s"


def test_a_terminal_shows_one_line_that_goes(clock: Clock, show: Any) -> None:
    screen = show(terminal=True)
    run_three_minutes(clock)
    assert screen.getvalue().count("\n") == 1
    assert "━" in screen.getvalue()
    assert screen.lines() == ["trials: 3 trials in 3 min 0 s", ""]


def test_what_is_said_meanwhile_starts_on_a_clean_line(clock: Clock, show: Any) -> None:
    screen = show(terminal=True)
    with job("training", 10) as bar:
        for step in range(10):
            clock.now += 0.4
            bar.step()
            if step == 5:
                say("a result")
    assert screen.lines() == ["a result", ""]


def test_an_interrupted_job_and_a_short_one_leave_nothing(clock: Clock, show: Any) -> None:
    screen = show(terminal=True)
    with pytest.raises(KeyboardInterrupt), job("training", 10):
        interrupt(clock)
    with job("short", 1):
        clock.now += progress.LONG / 2
    with job("starting"):
        clock.now += 100
    assert screen.lines() == [""]


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_leaves_results_alone(clock: Clock, show: Any, terminal: bool) -> None:
    screen = show(terminal)
    silence()
    run_three_minutes(clock)
    remark("a remark")
    say("a result")
    assert screen.getvalue() == "a result\n"


def test_only_the_main_process_of_several_shows_bars(clock: Clock, show: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = show(terminal=True)
    monkeypatch.setenv("RANK", "1")
    run_three_minutes(clock)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("columns", range(10, 140, 7))
def test_the_line_fits_and_names_the_innermost_job(clock: Clock, columns: int) -> None:
    jobs = [Job("cells", 40, "cells", 3), Job("trials", 12, "trials", 2), Job("training", 1500, "steps", 700)]
    jobs[1].note, jobs[2].note = "best 0.8219", "loss 0.431, accuracy 0.802"
    clock.now += 90
    line = compose(jobs, columns)
    assert len(line) < columns
    assert "training"[: columns - 1] in line
    assert re.match(r"cells .* \| trials 2/12.* \| training #+\.+ 700/1,500", compose(jobs, 200))


def test_the_time_left_counts_what_this_process_did(clock: Clock) -> None:
    fresh, resumed = Job("training", 100, "steps", 0), Job("training", 100, "steps", 60)
    clock.now += 20
    fresh.done, resumed.done = 20, 80
    assert (fresh.seconds_left(), resumed.seconds_left()) == (80, 20)
    assert Job("download", None, "items", 0).seconds_left() is None


def test_a_given_estimate_runs_down(clock: Clock) -> None:
    cells = Job("cells", 12, "", 1)
    cells.update(left=600.0)
    found = []
    for _ in range(3):
        found.append(cells.seconds_left())
        clock.now += 400
    assert found == [600, 200, 0]


def test_seconds_are_written_for_people() -> None:
    found = [format_seconds(value) for value in (0.4, 59, 61, 3599, 7260, 86400 * 3)]
    assert found == ["0 s", "59 s", "1 min 1 s", "60 min", "2 h 1 min", "3 d 0 h"]


def test_the_estimate_of_a_training_counts_evaluations(clock: Clock) -> None:
    """Steps of 0.5 s and evaluations of 12 s: after the first evaluation the estimate is exact."""
    said: list[str] = []
    shown = Progress(said.append, forward_steps=20)
    args = SimpleNamespace(eval_steps=25)
    state = SimpleNamespace(max_steps=100, global_step=0)
    shown.on_train_begin(args, state, None)
    left = {}
    for step in range(1, 101):
        shown.on_step_begin()
        clock.now += 0.5
        state.global_step = step
        shown.on_step_end(args, state, None)
        left[step] = shown._training.seconds_left() if shown._training else None
        if step % 25 == 0:
            clock.now += 12
            shown.on_evaluate()
    shown.close()
    # Four evaluations, and that of the rows that are reported.
    assert left[10] == pytest.approx(90 * 0.5 + 5 * 20 * 0.5)
    assert left[60] == pytest.approx(40 * 0.5 + 3 * 12)
    (line,) = said
    assert line.startswith("about 1 min 38 s (2 steps/s in the first 4 steps")


def test_the_clock_runs_while_a_job_makes_no_call(show: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = show(terminal=False)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress._Display, "_run", lambda self, stop: self.tick(0.0))
    with job("decomposition"):
        end = time.monotonic() + 5
        while not screen.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert screen.getvalue().startswith("decomposition, 0 s so far\n")
