"""Admit trials to a device only while their estimated memory fits beside that of the trials which run on it.

All workers of this machine, also those of other commands and studies, share one list per device: a JSON file below the
system's folder for temporary files, changed under a lock. Entries of processes that have ended are dropped, so that a
killed worker keeps no memory reserved.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparsegrad.files import unwritable, write_json
from sparsegrad.hashing import SHORT, json_sha256
from sparsegrad.runs.memory_estimate import GIB
from sparsegrad.sweeps.leases import is_alive, this_worker

_OVERTAKES = 8  # smaller trials that may pass a waiting one; then it is next, so that it does not wait forever


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trial on a device.

    Attributes:
        worker: the process that runs it.
        ticket: grows with the time at which it asked.
        size: bytes that it needs.
        is_running: whether it was admitted; else it waits.
        overtaken: number of trials that asked later and were admitted before it.
    """

    worker: dict[str, Any]
    ticket: int
    size: int
    is_running: bool = False
    overtaken: int = 0


def fits(others: list[Entry], mine: Entry, capacity: int) -> bool:
    """Whether a waiting trial may start: its memory is free, and no earlier one has been passed too often."""
    used = sum(entry.size for entry in others if entry.is_running)
    is_starving = any(entry.overtaken >= _OVERTAKES for entry in _find_waiting(others, mine.ticket))
    return not is_starving and used + mine.size <= capacity


def pass_waiting(others: list[Entry], ticket: int) -> list[Entry]:
    """The list of the others after the trial of `ticket` has started before those that wait for longer."""
    passed = _find_waiting(others, ticket)
    return [replace(entry, overtaken=entry.overtaken + 1) if entry in passed else entry for entry in others]


def _find_waiting(others: list[Entry], ticket: int) -> list[Entry]:
    """The trials that waited before the one of `ticket` asked."""
    return [entry for entry in others if not entry.is_running and entry.ticket < ticket]


class Device:
    """The memory of one device.

    Args:
        name: of the device, the same in all processes of this machine.
        capacity: bytes that trials may use together.
        folder: of the lists; None: one per user below the folder for temporary files.
    """

    def __init__(self, name: str, capacity: int, folder: Path | None = None) -> None:
        self.name, self.capacity = name, capacity
        folder = folder or Path(tempfile.gettempdir()) / f"sparsegrad-{os.getuid() if hasattr(os, 'getuid') else 0}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None
        # Numbers of processes say nothing on another machine, with which the folder may be shared.
        machine = json_sha256(this_worker()["machine"])[:SHORT]
        self._file = folder / f"{name}-{machine}.json"
        self._lock = FileLock(self._file.with_suffix(".lock"))

    @contextmanager
    def reserve(self, size: int, pause: Callable[[str], None]) -> Iterator[None]:
        """Within: `size` bytes of the device are reserved for this process, at most all of it.

        Args:
            size: bytes.
            pause: is called with the reason, again and again, while they are not free; it should sleep.
        """
        mine = self._ask(min(size, self.capacity))
        try:
            while (free := self._try(mine)) is not None:
                pause(f"waits for {mine.size / GIB:.1f} GiB of {self.name}, of which {free / GIB:.1f} are free")
            yield
        finally:
            with self._lock:
                self._write(self._read_others(mine))

    def entries(self) -> list[Entry]:
        """The trials that run or wait on the device; those of processes that have ended are left out."""
        try:
            rows = json.loads(self._file.read_text(encoding="utf-8"))["trials"]
            entries = [Entry(**row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # no list yet, or a damaged one, which the next trial replaces
        return [entry for entry in entries if is_alive(entry.worker)]

    def _ask(self, size: int) -> Entry:
        with self._lock:
            entries = self.entries()
            ticket = 1 + max((entry.ticket for entry in entries), default=0)
            mine = Entry(worker=this_worker(), ticket=ticket, size=size)
            self._write([*entries, mine])
        return mine

    def _try(self, mine: Entry) -> int | None:
        """Start the trial and return None; or, if it must wait, return the free bytes."""
        with self._lock:
            others, entries = self._read_others(mine), self.entries()
            # Others count there how often this one was passed. It is missing if somebody has deleted the list.
            now = next((entry for entry in entries if entry.worker == mine.worker), mine)
            if fits(others, now, self.capacity):
                self._write([*pass_waiting(others, now.ticket), replace(now, is_running=True)])
                return None
            return self.capacity - sum(entry.size for entry in others if entry.is_running)

    def _read_others(self, mine: Entry) -> list[Entry]:
        return [entry for entry in self.entries() if entry.worker != mine.worker]

    def _write(self, entries: list[Entry]) -> None:
        write_json(self._file, {"trials": [asdict(entry) for entry in entries]})
