"""Progress of long jobs: one line with the time left in a terminal, plain lines every 30 s in a pipe or a log file.

    for batch in track(batches, desc="calibration"): ...
    with job("training", total=150, unit="steps") as bar:
        bar.step()

Jobs nest: an outer job, such as the trials of a sweep, is shown before the inner one on the same line. Bars go to
stderr; `say` and `remark` print lines that no bar disturbs. `silence()`, or `SPARSEGRAD_QUIET=1` in the environment,
leaves out bars and remarks. Only the main process of several shows bars. The module needs no other package, so that the
library can use it too.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

# An environment variable, so that processes started from here are quiet too. `bars`: no bars, but remarks.
QUIET, NO_BARS = "SPARSEGRAD_QUIET", "bars"
DELAY = 1.0  # seconds before a job is shown in a terminal: short ones would only flash
REDRAW = 0.2  # seconds between two drawings in a terminal
EVERY = 30.0  # seconds between two plain lines
LONG = 5.0  # seconds from which the end of a job is noted
_BAR = 20  # columns of a bar, where there is room
_CLEAR = "\r\x1b[K"


class Job:
    """One job with a name and, if known, a number of items. Made by `job` and `track`.

    Attributes:
        name: what is done.
        total: number of items; None if unknown.
        unit: name of the items in the line at the end, in the plural; may be empty.
        done: items that are finished.
        note: shown behind the numbers, such as the newest loss.
        left: seconds that were left when the latest estimate was given; None: estimated from the speed so far.
    """

    def __init__(self, name: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.note, self.left = "", None  # type: str, float | None
        self.began = self._estimated_at = time.monotonic()
        self._first = done  # what an interrupted job had done before says nothing about this one's speed

    def step(self, count: int = 1) -> None:
        """Note that `count` more items are finished."""
        self.update(done=self.done + count)

    def update(self, *, done: int | None = None, note: str | None = None, left: float | None = None) -> None:
        """Note the number of finished items, a remark, or a better estimate of the seconds left."""
        self.done = self.done if done is None else done
        self.note = self.note if note is None else note
        if left is not None:
            self.left, self._estimated_at = left, time.monotonic()
        _display.tick(REDRAW)

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def seconds_left(self) -> float | None:
        """The given estimate less the time since, else one from the speed so far; None if nothing is known yet."""
        if self.left is not None:
            return max(0.0, self.left - (time.monotonic() - self._estimated_at))
        if self.total is None:
            return None
        made = self.done - self._first
        return None if made <= 0 else self.seconds() / made * max(0, self.total - self.done)

    def text(self) -> str:
        """`training 67/150, 40 s left`, without the note."""
        left = self.seconds_left()
        count = "" if self.total is None else f" {self.done:,}/{self.total:,}"
        clock = f"{format_seconds(self.seconds())} so far" if left is None else f"{format_seconds(left)} left"
        return f"{self.name}{count}, {clock}"

    def end(self) -> str:
        """`training: 150 steps in 1 min 2 s`."""
        count = f"{format_count(self.done, self.unit)} in " if self.unit else ""
        return f"{self.name}: {count}{format_seconds(self.seconds())}"


class _Display:
    """The line that shows all open jobs. Its thread keeps the clock running while a job makes no call."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._lock = threading.RLock()
        self._stop: threading.Event | None = None
        self._last = 0.0
        self._is_drawn = False
        self.yields = 0  # open calls of `foreign_bars`

    def open(self, one: Job) -> None:
        with self._lock:
            self._jobs.append(one)
            if self._stop is None:
                self._last, self._stop = time.monotonic(), threading.Event()
                # A daemon: it must not keep a process alive that ends without closing its jobs.
                threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def close(self, one: Job, *, completed: bool) -> None:
        with self._lock:
            if one not in self._jobs:
                return
            self._jobs.remove(one)
            self.erase()
            if not self._jobs:
                if self._stop is not None:
                    self._stop.set()
                self._stop = None
                # Inner jobs are many, such as the evaluations of a training: only the outermost leaves a line, and no
                # start-up does.
                if completed and one.total is not None and one.seconds() >= LONG and not is_quiet():
                    _write(one.end() + "\n")

    def tick(self, interval: float) -> None:
        """Draw if the last drawing is old enough."""
        now = time.monotonic()
        # Read without the lock: a training step should not wait for a slow terminal.
        if now - self._last < interval or is_quiet():
            return
        with self._lock:
            terminal = _is_terminal()
            if not self._jobs or now - self._last < (interval if terminal else EVERY):
                return
            if terminal and (self.yields or now - self._jobs[0].began < DELAY):
                return
            self._last = now
            columns = shutil.get_terminal_size().columns if terminal else None
            line = compose(self._jobs, columns, _bar_characters())
            _write(f"{_CLEAR}{line}" if terminal else f"{line}\n")
            self._is_drawn = terminal

    def erase(self) -> None:
        """Remove the line from the terminal; the next drawing restores it."""
        with self._lock:
            if self._is_drawn:
                _write(_CLEAR)
            self._is_drawn = False

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(1.0):
            self.tick(1.0)


_display = _Display()


@contextmanager
def job(name: str, total: int | None = None, *, unit: str = "", done: int = 0) -> Iterator[Job]:
    """Show a job while the context lasts; call its `step` or `update`.

    Args:
        name: what is done, such as `calibration`.
        total: number of items; None if unknown.
        unit: name of the items, in the plural.
        done: items that an earlier process has finished.
    """
    one = start(name, total, unit=unit, done=done)
    try:
        yield one
    except BaseException:
        stop(one, completed=False)
        raise
    stop(one)


def start(name: str, total: int | None = None, *, unit: str = "", done: int = 0) -> Job:
    """Open a job that `stop` closes, where beginning and end are in different functions."""
    one = Job(name, total, unit, done)
    _display.open(one)
    return one


def stop(one: Job, *, completed: bool = True) -> None:
    """Close a job. The outermost one leaves a line with its time if it was long, `completed` and had a total."""
    _display.close(one, completed=completed)


def track(items: Iterable[Item], /, desc: str, *, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Yield each of `items` and show how many are finished; `total` is their number where `len` does not know it."""
    known: Any = items
    count = len(known) if total is None and hasattr(items, "__len__") else total
    with job(desc, count, unit=unit) as one:
        for item in items:
            yield item
            one.step()


def say(text: str, *, file: Any = None) -> None:
    """Print a line, to stdout by default, without leaving a piece of a bar before it. It is flushed at once."""
    _display.erase()
    print(text, file=file or sys.stdout, flush=True)


def remark(text: str) -> None:
    """`say` a line that `silence()` leaves out."""
    if os.environ.get(QUIET, "0") in ("", "0", NO_BARS):
        say(text)


def erase() -> None:
    """Remove the bar from the terminal before something else prints."""
    _display.erase()


@contextmanager
def foreign_bars() -> Iterator[None]:
    """While another library shows bars of its own in the terminal, ours stay away. A log file has only ours."""
    _display.erase()
    _display.yields += 1
    try:
        yield
    finally:
        _display.yields -= 1


def silence() -> None:
    """Show nothing from now on, here and in processes that are started from here."""
    _display.erase()
    os.environ[QUIET] = "1"


def is_quiet() -> bool:
    """Whether nothing is shown: it was asked for, or another process is the one that prints."""
    return os.environ.get(QUIET, "") not in ("", "0") or os.environ.get("RANK", "0") != "0"


def compose(jobs: Sequence[Job], columns: int | None, bar: str = "#.") -> str:
    """The line of open jobs, the outermost first.

    Args:
        jobs: the open jobs.
        columns: width of the terminal; what does not fit is left out: the bar first, then remarks, then outer jobs.
            None: no limit, and no bar.
        bar: the characters for done and not done.
    """
    whole = [f"{one.text()}, {one.note}" if one.note else one.text() for one in jobs]
    line = " | ".join(whole)
    if columns is None:
        return line
    room = columns - 1  # a full last column would make some terminals wrap
    inner = jobs[-1]
    if inner.total and len(line) + 8 <= room:
        width = min(_BAR, room - len(line) - 3)
        filled = round(width * min(1.0, inner.done / inner.total))
        drawn = bar[0] * filled + bar[1] * (width - filled)
        return " | ".join([*whole[:-1], f"{inner.name} {drawn}{whole[-1].removeprefix(inner.name)}"])
    shorter = [line, " | ".join([*whole[:-1], inner.text()]), " | ".join(one.text() for one in jobs), inner.text()]
    return next((text for text in shorter if len(text) <= room), inner.text()[:room])


def format_count(count: int, unit: str) -> str:
    """`1 step`, `1,000 steps`; `unit` is the plural."""
    ending = "es" if unit.endswith("ches") else "s"
    return f"{count:,} {unit.removesuffix(ending) if count == 1 else unit}"


def format_seconds(seconds: float) -> str:
    """`8 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def has_terminal() -> bool:
    """Whether stderr is a terminal; it may also be None, as after `2>&-`."""
    return sys.stderr is not None and sys.stderr.isatty()


def _is_terminal() -> bool:
    return has_terminal() and os.environ.get("TERM") != "dumb"


def _bar_characters() -> str:
    try:
        "━─".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#."
    return "━─"


def _write(text: str) -> None:
    """Write to stderr; where that is closed, there is nobody to show anything to."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # it may also be None
        os.environ[QUIET] = "1"
