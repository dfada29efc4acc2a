"""Checkpoints that are whole or not used: a manifest, written last, holds the size and hash of every file."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sparsegrad.errors import UserError
from sparsegrad.files import load_json, read_json, write_json
from sparsegrad.hashing import SHORT, file_sha256, tensors_sha256

MANIFEST = "manifest.json"
KEEP = 2  # the newest ones; the best one stays besides
PREFIX = "checkpoint-"
# What a file that is not there answers, or none that could be. All else, such as EIO, says nothing of the file.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_log = logging.getLogger("sparsegrad")


def seal(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: from now on the checkpoint counts. `facts` come back from `read_manifest`.

    Raises:
        UserError: when it cannot be written.
    """
    files = {path.name: _fingerprint(path) for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST}
    write_json(checkpoint / MANIFEST, {"files": files, **facts})


def read_manifest(checkpoint: Path | str) -> dict[str, Any]:
    """The manifest of a whole checkpoint."""
    content: dict[str, Any] = read_json(Path(checkpoint) / MANIFEST)
    return content


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there as it was written; reads them all.

    Raises:
        UserError: when a file is there and cannot be read, as on a disk that fails for a moment.
    """
    return _judged(lambda: _matches(checkpoint))


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, as is the best one it refers to; newer ones that are not are removed.

    Raises:
        UserError: when a file cannot be read; nothing is removed then.
    """
    damaged: list[Path] = []
    found = None
    for checkpoint in reversed(_sorted(folder)):
        if is_whole(checkpoint) and _best_is_whole(checkpoint):
            found = str(checkpoint)
            break
        damaged.append(checkpoint)
    for checkpoint in damaged:
        _log.warning("%s is damaged or was not written to its end: the one before is used", checkpoint)
        shutil.rmtree(checkpoint)
    return found


def prune(folder: Path, best_step: int | None) -> None:
    """Remove all checkpoints but the newest `KEEP` and the best one."""
    for checkpoint in _sorted(folder)[:-KEEP]:
        if _step(checkpoint) != best_step:
            shutil.rmtree(checkpoint, ignore_errors=True)


def load_state(checkpoint: Path | str) -> TrainerState:
    """The Trainer's state in a checkpoint; its best checkpoint is where it is now, should the folder have moved."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if state.best_global_step:
        state.best_model_checkpoint = str(Path(checkpoint).with_name(f"{PREFIX}{state.best_global_step}"))
    return state


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits of all tensors of `model`: equal for bit-equal weights of one layout."""
    named = model.state_dict().items()
    return tensors_sha256((f"{name}{tuple(value.shape)}", value) for name, value in named)[:SHORT]


def _judged(check: Callable[[], bool]) -> bool:
    """What `check` says of files; False also where one is missing, or never was what it should be."""
    try:
        return check()
    except UserError:
        raise
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise UserError(
            f"cannot read {error.filename} ({error.strerror or error}): nothing was deleted; try again when it can be "
            "read, or start the run over with resume=false"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def _matches(checkpoint: Path) -> bool:
    with _named(checkpoint / MANIFEST):
        files = load_json(checkpoint / MANIFEST)["files"]
    inside = all(Path(name).name == name for name in files)  # a manifest is of its own folder alone
    sizes = inside and all((checkpoint / name).stat().st_size == files[name][0] for name in files)
    whole = sizes and all(_fingerprint(checkpoint / name) == files[name] for name in files)
    return TRAINER_STATE_NAME in files and whole


def _best_is_whole(checkpoint: Path) -> bool:
    def check() -> bool:
        with _named(checkpoint / TRAINER_STATE_NAME):
            best = load_state(checkpoint).best_model_checkpoint  # hashed, but perhaps never a state
        return best is None or Path(best) == checkpoint or is_whole(Path(best))

    return _judged(check)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within: an error of reading, which knows no file, gets this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _sorted(folder: Path) -> list[Path]:
    """Checkpoints by step; other names are left alone."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def _fingerprint(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    with _named(path):
        return [path.stat().st_size, file_sha256(path)]
