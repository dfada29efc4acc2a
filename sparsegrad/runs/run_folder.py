"""The folders of one run: its lock, its checkpoints while it lasts, and what stays of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparsegrad.distributed import on_main
from sparsegrad.errors import BusyError
from sparsegrad.hashing import file_sha256
from sparsegrad.models.source import Sources
from sparsegrad.runs.config import RunConfig
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.checkpoints import last_checkpoint


@contextmanager
def run_lock(config: RunConfig, wait: float = 1.0) -> Iterator[None]:
    """Held while a run is at work: two processes must not write one folder of checkpoints.

    Args:
        config: the run.
        wait: seconds to wait for it. A process that asks whether a run is at work holds it for a moment.

    Raises:
        BusyError: when another process holds it.
    """
    folder = Path(config.work_dir) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{config.key}.lock")
    _acquire(lock, config.key, wait)
    try:
        yield
    finally:
        lock.release()


@on_main
def _acquire(lock: FileLock, key: str, wait: float) -> None:
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise BusyError(f"run {key} is at work in another process: wait for it, or stop it") from None


@on_main
def prepare_checkpoints(config: RunConfig, splits: Splits, sources: Sources) -> str | None:
    """The checkpoint to continue from, or None.

    The folder of checkpoints is emptied when a new start was asked for, or when other data, another model or another
    file of bases of the same name made what it holds.
    """
    made_from = {"data": splits.fingerprint, "source": json.dumps(sources.as_json(), sort_keys=True)}
    if (basis := hash_basis(config)) is not None:
        made_from["basis"] = basis
    folder = config.checkpoints
    # Checkpoints of earlier versions do not say what model and bases they began with.
    known = {name: text for name, text in made_from.items() if name == "data" or (folder / name).exists()}
    if config.force or not config.resume or any(_content(folder / name) != text for name, text in known.items()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made_from.items():
            (folder / name).write_text(text, encoding="utf-8")
    return last_checkpoint(folder)


def hash_basis(config: RunConfig) -> str | None:
    """SHA-256 of the file of bases that the method reads; None without one, or where it is not at hand."""
    path = getattr(config.method, "basis_file", None)
    return file_sha256(path) if path is not None and path.is_file() else None


def _content(path: Path) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


@on_main
def remove_checkpoints(config: RunConfig) -> None:
    """Delete what a finished run no longer needs; a saved model stays."""
    shutil.rmtree(config.checkpoints, ignore_errors=True)
    if config.run_folder.is_dir() and not any(config.run_folder.iterdir()):
        config.run_folder.rmdir()
