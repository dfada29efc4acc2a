"""Which worker runs a trial, and whether it is alive."""

from __future__ import annotations

import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial

WORKER, BEAT = "worker", "beat"


def this_worker() -> dict[str, Any]:
    """Identify this worker: machine, process number, and start time, as process numbers are reused."""
    return {"machine": _identify_machine(), "pid": os.getpid(), "started": round(psutil.Process().create_time(), 2)}


def _identify_machine() -> str:
    """Identify host, boot and process namespace: process numbers are comparable only within all three."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # not Linux: the name of the host alone
    return " ".join(parts)


class TrialLostError(RuntimeError):
    """Another worker considered this one dead and took over its trial."""


class Heartbeat:
    """Writes to the storage, while a trial runs, that its worker is alive.

    Attributes:
        lease: seconds after which a worker that writes nothing counts as dead.
    """

    def __init__(self, trial: Trial, seconds: float, lease: float) -> None:
        self._trial, self._seconds, self.lease = trial, seconds, lease
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.lost = False

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raise `TrialLostError` if the trial was given to another worker."""
        if self.lost:
            raise TrialLostError("the trial was given to another worker")

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._seconds):
            count += 1
            try:
                self._trial.set_user_attr(BEAT, count)
            except UpdateFinishedTrialError:
                self.lost = True
                return
            except Exception as error:
                # The storage may be unavailable for a moment, which each kind says by errors of its own: try again.
                optuna.logging.get_logger(__name__).warning("no heartbeat: %s", type(error).__name__)


class Watch:
    """Finds trials whose worker is dead: its process has ended, or its heartbeat has not changed for a lease.

    The watcher measures the lease on its own clock, from the last change that it saw. Clocks of different machines are
    never compared.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of this running trial is dead."""
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker["machine"] == _identify_machine():  # same machine: ask the system
            return not is_alive(worker)
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        seen = self._seen.get(trial.number)
        if seen is None or seen[0] != beat:
            self._seen[trial.number] = beat, now
            return False
        return now - seen[1] > self._lease


def is_alive(worker: dict[str, Any]) -> bool:
    """Whether the process of `this_worker` still runs on this machine."""
    try:
        process = psutil.Process(worker["pid"])
        # The start time tells a worker from a later process with the same number.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - worker["started"]) < 1
    except psutil.Error:
        return False
