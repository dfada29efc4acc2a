"""Checkpoints that are whole or not used: a manifest, written last, holds the size and hash of every file."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sparsegrad.records import read_json, write_json
from sparsegrad.tensor_bytes import tensor_bytes

MANIFEST = "manifest.json"
KEEP = 2  # the newest ones; the best one stays besides
PREFIX = "checkpoint-"
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
    """Whether every file of the manifest is there as it was written; reads them all."""
    try:
        files = read_manifest(checkpoint)["files"]
        inside = all(Path(name).name == name for name in files)  # a manifest is of its own folder alone
        sizes = inside and all((checkpoint / name).stat().st_size == files[name][0] for name in files)
        whole = sizes and all(_fingerprint(checkpoint / name) == files[name] for name in files)
        return TRAINER_STATE_NAME in files and whole
    except (OSError, ValueError, TypeError, LookupError):
        return False


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, as is the best one it refers to; newer ones that are not are removed."""
    for checkpoint in reversed(_sorted(folder)):
        if is_whole(checkpoint) and _best_is_whole(checkpoint):
            return str(checkpoint)
        _log.warning("%s is damaged or was not written to its end: the one before is used", checkpoint)
        shutil.rmtree(checkpoint)
    return None


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
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()[:16]


def _best_is_whole(checkpoint: Path) -> bool:
    try:
        best = load_state(checkpoint).best_model_checkpoint
        return best is None or Path(best) == checkpoint or is_whole(Path(best))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # hashed, but never a state
        return False


def _sorted(folder: Path) -> list[Path]:
    """Checkpoints by step; other names are left alone."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def _fingerprint(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
