"""Save a checkpoint and stop on SIGTERM or SIGUSR1, which Slurm sends before a job's time is up.

The checkpoint is written at the end of the current step; a running evaluation is finished first. A second signal, or
one outside training, stops the run at once. A signal that follows within `REPEAT` seconds counts as the same: a job's
signal reaches `torchrun` and its processes, and `torchrun` forwards its own.
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
REPEAT = 5.0  # seconds within which a signal is a repetition


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
        taken = [number for number in SIGNALS if mine and signal.getsignal(number) is signal.SIG_DFL]
        try:
            for number in taken:
                signal.signal(number, self._take)
            yield
        finally:
            for number in taken:
                signal.signal(number, signal.SIG_DFL)

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
        again = self.asked and time.monotonic() - self._since > REPEAT
        if not self.training or again:
            raise Stopped(number)
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
