"""The folders of one run: its lock, its checkpoints while it lasts, and what stays of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sparsegrad.distributed import is_main, on_main
from sparsegrad.errors import BusyError, ResourceError
from sparsegrad.hashing import SHORT, file_sha256, json_sha256
from sparsegrad.models.source import Sources
from sparsegrad.runs.config import RunConfig
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.checkpoints import last_checkpoint, newest_step

OWNER = "owner"  # the file beside checkpoints that says whose they are
UNSAVED = "unsaved"  # the file beside those that lead to what is not saved yet
Changes = dict[str, tuple[str, str]]  # name -> what the checkpoints were made from, and what there is now


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

    Checkpoints of another run, which has another name or results folder, are continued too: the same settings, data,
    model and bases lead to the same result. If these differ, or a new start was asked for, they are put aside for that
    run. Own ones are deleted where a new start was asked for.

    Raises:
        ResourceError: for own checkpoints of other data, another model or another file of bases of the same name.
    """
    folder = config.checkpoints
    _claim(config)
    made_from = _describe_content(config, splits, sources)
    changes, step = _find_changes(folder, made_from), newest_step(folder)
    is_anew, owned = config.force or not config.resume, is_own(folder, config)
    if changes and step is not None and owned and not is_anew:
        # No other `UserError`: a sweep would put it down to the trial's values.
        raise ResourceError(_explain_changes(config, changes, step))
    if changes or is_anew:
        if step is None or owned:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            _put_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {**made_from, OWNER: _owner(config)}.items():
            (folder / name).write_text(text, encoding="utf-8")
    return last_checkpoint(folder)


def is_own(folder: Path, config: RunConfig) -> bool:
    """Whether checkpoints are of a run with this name and results folder.

    So are those of nobody, for the first run that asks: of an earlier version, or of a results folder that is gone, as
    when it was moved.
    """
    owner = _read(folder / OWNER)
    return owner is None or owner == _owner(config) or _is_gone(owner)


def _is_gone(folder: str) -> bool:
    try:
        return not Path(folder).is_dir()
    except OSError:  # not to be looked into now, such as that of another user
        return False


def _owner(config: RunConfig) -> str:
    """The folder of the record, by whatever path the configuration names it."""
    return str(config.record_path.parent.resolve())


def _list_own(config: RunConfig) -> list[Path]:
    """The folders of checkpoints that are own, put aside or not; first those that name this run as their owner."""
    folder = config.checkpoints
    aside = [one for one in config.run_folder.glob(f"{folder.name}-*") if one == _aside(folder, _read(one / OWNER))]
    own = [one for one in (folder, *sorted(aside)) if one.is_dir() and is_own(one, config)]
    return sorted(own, key=lambda one: _read(one / OWNER) != _owner(config))


def _claim(config: RunConfig) -> None:
    """Let `config.checkpoints` be this run's own if it has any, also if another run has put them aside."""
    folder = config.checkpoints
    if not (own := _list_own(config)):
        return
    if own[0] != folder:
        if folder.is_dir():
            _put_aside(folder)
        own[0].rename(folder)
    (folder / OWNER).write_text(_owner(config), encoding="utf-8")


def _put_aside(folder: Path) -> None:
    folder.rename(_aside(folder, _read(folder / OWNER)))


def _aside(folder: Path, owner: str | None) -> Path:
    return folder.with_name(f"{folder.name}-{json_sha256(owner)[:SHORT]}")


@contextmanager
def noted_as_unsaved(config: RunConfig) -> Iterator[None]:
    """Within, and after any error: a note beside the checkpoints says that what they lead to is not saved yet."""
    note = config.checkpoints / UNSAVED
    with suppress(OSError):  # such as a full disk, which the saving reports
        if is_main():
            note.touch()
    yield
    if is_main():
        note.unlink(missing_ok=True)


def is_unsaved(config: RunConfig) -> bool:
    """Whether an earlier call trained to the end and did not save what this one shall save.

    If there is a complete record, that call was to replace it, with `force=true`.
    """
    asked = config.save_model or config.save_adapter is not None
    return asked and config.resume and any((folder / UNSAVED).exists() for folder in _list_own(config))


def _describe_content(config: RunConfig, splits: Splits, sources: Sources) -> dict[str, str]:
    """What checkpoints are made from: file beside them -> its text."""
    made_from = {"data": splits.fingerprint, "source": json.dumps(sources.as_json(), sort_keys=True)}
    basis = hash_basis(config)
    return made_from if basis is None else {**made_from, "basis": basis}


def _find_changes(folder: Path, made_from: Mapping[str, str]) -> Changes:
    before = {name: _read(folder / name) for name in made_from}
    # Checkpoints of earlier versions do not say what model and bases they began with.
    known = {name: text or "unknown" for name, text in before.items() if name == "data" or text is not None}
    return {name: (text, made_from[name]) for name, text in known.items() if text != made_from[name]}


def _explain_changes(config: RunConfig, changes: Changes, step: int) -> str:
    names = {
        "data": "other data (fingerprint",
        "source": "another model or tokenizer of the same name (before",
        "basis": f"another content of method.basis={getattr(config.method, 'basis_file', None)} (sha256",
    }
    what = " and ".join(f"{names[name]} {before}, now {now})" for name, (before, now) in changes.items())
    on_hub = ("data" in changes and config.data.dir is None) or "commit:" in changes.get("source", ("", ""))[0]
    restore = "" if on_hub else "restore that, "  # a branch of the hub that has moved on stays there
    return (
        f"the checkpoints of this run, up to step {step:,}, were made with {what}: {restore}choose "
        f"another name=, or begin anew with resume=false, which deletes them ({config.checkpoints})"
    )


def delete_checkpoints_of_other_data(config: RunConfig, fingerprint: str, keys: Collection[str] = ()) -> None:
    """Delete the checkpoints of all runs with this name and results folder that were not made with this data.

    Args:
        config: a run with this name and results folder.
        fingerprint: of the data.
        keys: of runs of this name; also their checkpoints of nobody (see `is_own`) are deleted.
    """
    for folder in Path(config.work_dir).glob("*/checkpoints*"):
        is_named = _read(folder / OWNER) == _owner(config)
        is_mine = is_named or (folder.parent.name in keys and is_own(folder, config))
        if is_mine and _read(folder / "data") != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)


def hash_basis(config: RunConfig) -> str | None:
    """SHA-256 of the file of bases that the method reads; None without one, or where it is not at hand."""
    path = getattr(config.method, "basis_file", None)
    return file_sha256(path) if path is not None and path.is_file() else None


def _read(path: Path) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


@on_main
def remove_checkpoints(config: RunConfig) -> None:
    """Delete what a finished run no longer needs; a saved model stays, and so do the checkpoints of other runs."""
    delete_own_checkpoints(config)
    if config.run_folder.is_dir() and not any(config.run_folder.iterdir()):
        config.run_folder.rmdir()


def delete_own_checkpoints(config: RunConfig) -> None:
    """Delete the checkpoints of this run, also if another run has put them aside.

    Those of a results folder that is gone stay unless this run has continued them: its disk may only be away.
    """
    for folder in _list_own(config):
        if _read(folder / OWNER) in (None, _owner(config)):
            shutil.rmtree(folder, ignore_errors=True)
