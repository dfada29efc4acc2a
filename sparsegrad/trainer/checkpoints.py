"""Checkpoints that are complete or not used: a manifest, written last, lists size and hash of every file."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sparsegrad.distributed import from_main, rank, whole
from sparsegrad.errors import ResourceError
from sparsegrad.files import flush, load_json, unreadable, unwritable, write_json
from sparsegrad.hashing import SHORT, file_sha256, json_sha256, tensors_sha256

MANIFEST = "manifest.json"
KEEP = 2  # newest checkpoints that are kept, besides the best one of each
PREFIX = "checkpoint-"
OR_RESTART = ", or restart the run with resume=false"
# Error numbers of files that do not exist. Any other, such as EIO, says nothing about the file.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_log = logging.getLogger("sparsegrad")


def seal(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest; only then does the checkpoint count. `read_manifest` returns `facts` again.

    All files are on the disk before the manifest is, and the manifest before this returns: after a power failure, a
    checkpoint that has a manifest is whole, and older ones may be deleted.

    Raises:
        ResourceError: if a file cannot be written to the disk.
    """
    # A folder, of a tokenizer with several chat templates, is not read again.
    paths = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)
    for path in paths:
        try:
            flush(path)
        except OSError as error:  # the system may report a full disk only now
            raise unwritable(path, error) from error
    _flush_folder(checkpoint)
    content = {"files": {path.name: _fingerprint_file(path) for path in paths}, **facts}
    write_json(checkpoint / MANIFEST, {**content, "sha256": json_sha256(content)})
    _flush_folder(checkpoint)
    _flush_folder(checkpoint.parent)


def _flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def read_manifest(checkpoint: Path | str) -> dict[str, Any]:
    """Read the manifest of a complete checkpoint."""
    content: dict[str, Any] = load_json(Path(checkpoint) / MANIFEST)
    return content


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was completed in `folder`; its files are not read."""
    return newest_step(folder) is not None


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that was completed in `folder`, or None; its files are not read."""
    return max((_parse_step(path.parent) for path in folder.glob(f"{PREFIX}*/{MANIFEST}")), default=None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest exists and is unchanged; reads all of them.

    Raises:
        ResourceError: if a file exists but cannot be read, as after a temporary failure of the disk.
    """
    return _run_check(lambda: _matches_manifest(checkpoint))


def check_whole(checkpoint: Path) -> None:
    """Check that a checkpoint of this run is still whole, and in sight of every process; all processes call this.

    The main process reads the files, the others only look for them.

    Raises:
        ResourceError: if it is not, or a file exists but cannot be read.
    """
    from_main(lambda: _refuse_damaged(checkpoint))
    if lacking := [name for name in read_manifest(checkpoint)["files"] if not (checkpoint / name).exists()]:
        raise ResourceError(
            f"{checkpoint / lacking[0]} cannot be seen by process {rank()}: work_dir must be on a file system that all "
            "machines share; the same command continues from the last checkpoint"
        )


def _refuse_damaged(checkpoint: Path) -> None:
    if not is_whole(checkpoint):
        raise ResourceError(
            f"{checkpoint} has been damaged or deleted since it was written: the same command continues from an "
            "earlier checkpoint, or starts over if there is none"
        )


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is complete, together with the best one it refers to; None if there is none.

    Newer ones that are damaged are deleted.

    Raises:
        ResourceError: if a file cannot be read; then nothing is deleted.
    """
    damaged: list[Path] = []
    found = None
    for checkpoint in reversed(_list_checkpoints(folder)):
        if is_whole(checkpoint) and _best_is_whole(checkpoint):
            found = str(checkpoint)
            break
        damaged.append(checkpoint)
    # Deleted only now: the loop raises if a file cannot be read, and nothing must be lost then.
    instead = "the run starts over" if found is None else f"using {found}"
    for checkpoint in damaged:
        _log.warning("%s, or the best one that it names, is damaged or incomplete: %s", checkpoint, instead)
        shutil.rmtree(checkpoint)
    return found


def prune(folder: Path, best_step: int | None) -> None:
    """Delete all checkpoints except the newest `KEEP`, the best one, and the one that each of those names as its best.

    Without the last, a checkpoint could not take the place of a newer one that is damaged and was the first to be best.
    """
    found = _list_checkpoints(folder)
    kept = {best_step, *(_read_best_step(checkpoint) for checkpoint in found[-KEEP:])}
    for checkpoint in found[:-KEEP]:
        if _parse_step(checkpoint) not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _read_best_step(checkpoint: Path) -> int | None:
    """The best step that a checkpoint names; None if it names none, or cannot be read."""
    step: int | None = None
    with suppress(OSError, ValueError, TypeError):
        step = load_state(checkpoint).best_global_step
    return step


def load_state(checkpoint: Path | str) -> TrainerState:
    """Read the Trainer's state of a checkpoint; the path of the best one is corrected, as the folder may have moved."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if state.best_global_step:
        state.best_model_checkpoint = str(Path(checkpoint).with_name(f"{PREFIX}{state.best_global_step}"))
    return state


def weights_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits of all tensors of `model`: equal for equal weights, bit for bit."""
    named = model.state_dict().items()
    return tensors_sha256((f"{name}{tuple(value.shape)}", whole(value)) for name, value in named)[:SHORT]


def _run_check(check: Callable[[], bool]) -> bool:
    """Return the result of `check`; False also if a file is missing or malformed.

    Raises:
        ResourceError: if a file exists but cannot be read.
    """
    try:
        return check()
    except ResourceError:
        raise
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise unreadable(error.filename, error, OR_RESTART) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def _matches_manifest(checkpoint: Path) -> bool:
    with _add_path_to_errors(checkpoint / MANIFEST):
        content = load_json(checkpoint / MANIFEST)
    own = content.pop("sha256", None)  # missing in those of earlier versions
    if own is not None and own != json_sha256(content):
        return False
    files = content["files"]
    inside = all(Path(name).name == name for name in files)  # no path may lead outside the folder
    # Sizes first: they find most damage without reading gigabytes.
    sizes = inside and all((checkpoint / name).stat().st_size == files[name][0] for name in files)
    whole = sizes and all(_fingerprint_file(checkpoint / name) == files[name] for name in files)
    return TRAINER_STATE_NAME in files and whole


def _best_is_whole(checkpoint: Path) -> bool:
    def check() -> bool:
        with _add_path_to_errors(checkpoint / TRAINER_STATE_NAME):
            best = load_state(
                checkpoint
            ).best_model_checkpoint  # its hash is right, but it may never have been a valid state
        return best is None or Path(best) == checkpoint or is_whole(Path(best))

    return _run_check(check)


@contextmanager
def _add_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path to errors raised inside: those of a failed read have no file name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints by step; folders of other names are ignored."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and _parse_step(path) >= 0]
    return sorted(found, key=_parse_step)


def _parse_step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def _fingerprint_file(path: Path) -> list[Any]:
    """Return size and SHA-256 of a file."""
    with _add_path_to_errors(path):
        return [path.stat().st_size, file_sha256(path)]
