"""Which signal ends a run at once, and which is the first one repeated."""

from __future__ import annotations

import signal

import pytest

from sparsegrad.trainer import signals as stopping
from sparsegrad.trainer.signals import StopOnSignal, Stopped


def test_a_signal_repeated_at_once_is_one_and_a_later_one_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals launcher and processes, and the launcher its processes again."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopOnSignal()
    stop.on_train_begin()
    for seconds in (0, 0.5, 4):
        now[0] = 100.0 + seconds
        stop._take(signal.SIGTERM, None)
    assert stop.asked == signal.SIGTERM
    now[0] = 106.0
    with pytest.raises(Stopped):
        stop._take(signal.SIGTERM, None)


def test_a_signal_outside_training_ends_the_run_at_once() -> None:
    with pytest.raises(Stopped):
        StopOnSignal()._take(signal.SIGUSR1, None)


def test_ctrl_c_outside_training_is_an_ordinary_one() -> None:
    """A sweep tells it from the signals that it passes on to its workers, which a terminal's Ctrl-C reaches anyway."""
    with pytest.raises(KeyboardInterrupt) as raised:
        StopOnSignal()._take(signal.SIGINT, None)
    assert not isinstance(raised.value, Stopped)
