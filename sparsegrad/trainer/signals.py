"""SIGTERM and SIGUSR1, as Slurm sends them before it takes a machine away: save first, then end.

The signal is answered at the end of the step at work; an evaluation at work is finished first. A second signal, or one
outside training, ends the run at once. One that follows within seconds is the same: a job's signal reaches `torchrun`
and its processes, and `torchrun` hands its own on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from sparsegrad.trainer.processes import largest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT = 5.0  # seconds in which a signal is a repetition


class Stopped(KeyboardInterrupt):
    """The run was stopped by the signal `number`; the command ends with the status 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint and raises `Stopped` when a signal has come, on every process at the same step."""

    def __init__(self) -> None:
        self.training = False
        self.asked = 0  # by a signal to this process
        self.agreed = 0  # by all processes
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within: signals are answered, unless whoever runs this process handles them, or this is no main thread."""
        mine = threading.current_thread() is threading.main_thread()
        taken = [number for number in SIGNALS if mine and signal.getsignal(number) is signal.SIG_DFL]
        try:
            for number in taken:
                signal.signal(number, self._take)
            yield
        finally:
            for number in taken:
                signal.signal(number, signal.SIG_DFL)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """From now on there is something to save."""
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint if any process was signalled."""
        self.agreed = largest(self.asked)
        control.should_save = control.should_save or bool(self.agreed)

    def on_save(self, *_: Any, **__: Any) -> None:
        """The checkpoint is written: end."""
        if self.agreed:
            raise Stopped(self.agreed)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """All is saved: what is left to do, the next start does."""
        self.training = False
        if agreed := largest(self.asked):
            raise Stopped(agreed)

    def _take(self, number: int, _: FrameType | None) -> None:
        again = self.asked and time.monotonic() - self._since > REPEAT
        if not self.training or again:
            raise Stopped(number)
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
