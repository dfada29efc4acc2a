"""One process at a time saves to an adapter's folder; so what it finds of another unfinished save is of a dead one."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError

from sparsegrad.errors import ResourceError, UserError
from sparsegrad.files import unwritable

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)
# Empty. It stays: if it were deleted while others wait for it, two of them could be let in.
_LOCK = ".sparsegrad_adapter.lock"
_FOR_ALL = 0o666  # another user who saves to the folder has to open it
_PAUSE = 0.05  # seconds between two attempts to take the lock


class Files(NamedTuple):
    """The files of one format of adapters.

    Attributes:
        entry: the JSON without which no loader takes the tensors.
        tensors: the other file.
        scratch: name of the folder of a save in progress, with `*` for the process id.
        dead: patterns of further files that a killed save leaves.
        settle: called with the adapter's folder, completes or undoes a save that was interrupted.
    """

    entry: str
    tensors: str
    scratch: str
    dead: tuple[str, ...]
    settle: Callable[[Path], object]


@dataclass
class _Turn:
    """What one thread has of a folder.

    Attributes:
        lock: taken more than once if a signal handler saves during a save.
        begun: the number of saves that it has begun.
    """

    lock: FileLock
    begun: int = 0


# By process (a fork has not what its parent has), thread and folder.
_TURNS: dict[tuple[int, int, Path], _Turn] = {}


@contextmanager
def saving(folder: Path, files: Files) -> Iterator[Path]:
    """Within: an empty folder inside `folder`, to which no other process or thread saves meanwhile.

    Where the lock cannot be had, as on some network file systems, it is possible that one does, and nothing of others
    is deleted. A save within a save can only come from a signal handler. It does not wait, and deletes what the outer
    one has begun, whose next step fails.

    Args:
        folder: created if needed.
        files: of the adapter; interrupted saves are settled, at the beginning those of before, at the end this one.

    Raises:
        ResourceError: when the folder cannot be written, or a save from a signal handler came in between.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as (turn, alone):
            turn.begun = number = turn.begun + 1
            try:
                with _scratch(folder, files, alone) as scratch:
                    yield scratch
            except (OSError, SafetensorError, UserError):
                if turn.begun != number:
                    raise ResourceError(_explain_handler(folder)) from None
                raise
    except (OSError, SafetensorError) as error:
        raise unwritable(folder / files.tensors, error) from None


def remove_files(folder: Path, files: Files) -> None:
    """Delete the adapter of one format, its JSON first: without it no loader takes what is left.

    Raises:
        ResourceError: when a file cannot be deleted.
    """
    try:
        with _locked(folder) as (_, alone):
            files.settle(folder)  # renames what would stay under another name
            for name in (files.entry, files.tensors):
                (folder / name).unlink(missing_ok=True)
            if alone:
                _delete(folder, files.scratch, *files.dead)
    except OSError as error:
        raise unwritable(folder / files.entry, error) from None


@contextmanager
def _scratch(folder: Path, files: Files, alone: bool) -> Iterator[Path]:
    own = folder / files.scratch.replace("*", str(os.getpid()))
    files.settle(folder)
    _delete(folder, own.name, *((files.scratch, *files.dead) if alone else ()))
    own.mkdir()
    with suppress(OSError):  # whoever may write to the folder has to settle this save if it is killed
        own.chmod(stat.S_IMODE(own.stat().st_mode) | (folder.stat().st_mode & 0o777))
    try:
        yield own
    finally:
        files.settle(folder)
        _delete(folder, own.name)


def _explain_handler(folder: Path) -> str:
    return (
        f"cannot write {folder}: a save to the same folder, from a signal handler, came in between; the folder holds "
        "that adapter, complete: save again"
    )


def _delete(folder: Path, *patterns: str) -> None:
    """Delete the files and folders of these names in `folder`; what cannot be deleted stays."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[tuple[_Turn, bool]]:
    """Within: this thread has the lock of `folder`; yields False where there is none to have."""
    from filelock import FileLock  # nothing but a save needs it

    where = folder.resolve()
    key = (os.getpid(), threading.get_ident(), where)
    is_outer = key not in _TURNS
    # Before the lock is taken: a signal handler that saves in between must take it by the same object.
    turn = _TURNS.setdefault(
        key,
        # No substitute of filelock's: if a process is killed, others would wait for it for ever.
        _Turn(FileLock(where / _LOCK, mode=_FOR_ALL, fallback_to_soft=False)),
    )
    try:
        yield turn, _take(turn.lock, folder)
    finally:
        with suppress(OSError):
            turn.lock.release(force=is_outer)
        if is_outer:
            del _TURNS[key]


def _take(lock: FileLock, folder: Path) -> bool:
    """Wait for a lock; False if it cannot be created or opened, or the file system has none."""
    from filelock import Timeout

    # Many attempts instead of one that waits, during which filelock refuses the lock to a signal handler.
    waits = False
    while True:
        try:
            lock.acquire(timeout=0)
            return True
        except Timeout:
            if not waits:
                logger.warning("%s: waits for another process that saves to this folder", folder)
            waits = True
            time.sleep(_PAUSE)
        except (OSError, RuntimeError):
            return False
