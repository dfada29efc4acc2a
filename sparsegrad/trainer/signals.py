"""Save a checkpoint and stop on Ctrl-C, and on SIGTERM or SIGUSR1, which Slurm sends before a job's time is up.

The checkpoint is written at the end of the current step; a running evaluation is finished first. A second signal, or
one outside training, stops the run at once. A signal that follows within `REPEAT` seconds counts as the same: a job's
signal reaches `torchrun` and its processes, and `torchrun` forwards its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from sparsegrad.progress import is_quiet
from sparsegrad.trainer.processes import largest

# Each with Python's own handler: one that somebody else has set stays.
SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
REPEAT = 5.0  # seconds within which a signal is a repetition
KEYS = 1.0  # the same for Ctrl-C: a person who presses it again wants the run to stop now
SAVING = "interrupted: saving a checkpoint after this step or evaluation; Ctrl-C again stops at once"


class Stopped(KeyboardInterrupt):
    """The run was stopped by the signal `number`; the command ends with the status 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint and raises `Stopped` after a signal, in every process at the same step."""

    def __init__(self) -> None:
        self.training = False
        self.asked = 0  # signal that this process received
        self.agreed = 0  # signal on which all processes agree
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the context, except those that have a handler already; needs the main thread."""
        mine = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
        taken = {number: own for number, own in SIGNALS.items() if mine and signal.getsignal(number) is own}
        try:
            for number in taken:
                signal.signal(number, self._take)
            yield
        finally:
            for number, own in taken.items():
                signal.signal(number, own)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """From now on a signal leads to a checkpoint."""
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint if any process has received a signal."""
        # All processes must save at the same step, so they agree on the largest number received.
        self.agreed = largest(self.asked)
        control.should_save = control.should_save or bool(self.agreed)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Stop: the checkpoint is written."""
        if self.agreed:
            raise Stopped(self.agreed)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop after the last step too: its checkpoint is written, and the next start does the rest."""
        self.training = False
        if agreed := largest(self.asked):
            raise Stopped(agreed)

    def _take(self, number: int, _: FrameType | None) -> None:
        """Remember the signal, or stop at once outside training and at a second one."""
        again = self.asked and time.monotonic() - self._since > (KEYS if number == signal.SIGINT else REPEAT)
        if not self.training or again:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            if number == signal.SIGINT and not is_quiet():
                _print_now(SAVING)


def _print_now(line: str) -> None:
    """Print to stderr from a handler, which may interrupt a `print`: not through Python's buffer, which would raise."""
    with suppress(AttributeError, OSError, ValueError):  # closed, or no file: then nobody reads it
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
