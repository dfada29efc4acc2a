"""Who works on a trial, whether he is alive, and what is done if not."""

from __future__ import annotations

import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial

WORKER, BEAT = "worker", "beat"


def this_worker() -> dict[str, Any]:
    """Machine and process, exact enough that another process with the same number is not taken for this one."""
    return {"machine": _machine(), "pid": os.getpid(), "started": round(psutil.Process().create_time(), 2)}


def _machine() -> str:
    """Host, boot and process namespace: only within one of them do process numbers mean the same."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # not Linux: the host's name must do
    return " ".join(parts)


class TrialLostError(RuntimeError):
    """Another worker took this one for dead and gave its trial away."""


class Heartbeat:
    """Tells the storage, while a trial runs, that its worker lives."""

    def __init__(self, trial: Trial, seconds: float) -> None:
        self._trial, self._seconds = trial, seconds
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
        """Raise `TrialLostError` if the trial is no longer this worker's."""
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
            except (OptunaError, OSError, KeyError) as error:
                # A storage that is away for a moment is no reason to stop: the next beat tries again.
                optuna.logging.get_logger(__name__).warning("no heartbeat: %s", type(error).__name__)


class Watch:
    """Finds trials whose worker is dead: its process is gone, or its heartbeat stood still for a lease.

    The lease is measured on the clock of the watcher, who sees the beats change or not: clocks of different machines
    are never compared.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on this running trial any more."""
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker["machine"] == _machine():
            return not _is_alive(worker)
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        seen = self._seen.get(trial.number)
        if seen is None or seen[0] != beat:
            self._seen[trial.number] = beat, now
            return False
        return now - seen[1] > self._lease


def _is_alive(worker: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(worker["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - worker["started"]) < 1
    except psutil.Error:
        return False
