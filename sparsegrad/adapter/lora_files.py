"""The two files of a peft adapter, written so that a loader never sees the tensors of one and the JSON of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegrad.adapter.folder_lock import Files, saving
from sparsegrad.errors import UserError, first_line
from sparsegrad.files import flush, load_json, save_tensors, unreadable, write_json
from sparsegrad.hashing import file_sha256

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
_SCRATCH = ".adapter_model.*.saving"  # folder of a save in progress, with the process id
_OLD = "old.json"  # the configuration of the old adapter, while its tensors are replaced
_NEW = "{}.json"  # that of the new one; the name is the sha256 of its tensors
# What a killed save of an earlier version left.
_DEAD = (".adapter_model.safetensors.*.new", ".adapter_config.json.*.new", "..adapter_config.json.*.tmp")


def write_lora(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files. After an error or Ctrl-C the folder holds the old or the new adapter, complete.

    peft's file names are fixed, and two renames are not atomic. If the configuration differs, the old one is put aside
    before the tensors are replaced: a process killed between two of these steps leaves a folder without
    adapter_config.json, which every loader refuses. The next save, or `settle_lora`, completes or undoes what it did.

    Args:
        folder: created if needed.
        config: content of adapter_config.json.
        tensors: contiguous tensors by name, none of which share memory.

    Raises:
        UserError: when the folder cannot be written.
    """
    with saving(folder, LORA) as scratch:
        # All that can fail for lack of space comes before the first change of the old adapter.
        waiting = scratch / TENSORS
        save_tensors(tensors, waiting, {"format": "pt"})  # transformers and peft require this metadata
        flush(waiting)
        new = scratch / _NEW.format(file_sha256(waiting))
        write_json(new, config)
        if (folder / CONFIG).exists() and not _has_config(folder, config):
            (folder / CONFIG).replace(scratch / _OLD)
        waiting.replace(folder / TENSORS)
        new.replace(folder / CONFIG)


def settle_lora(folder: Path) -> None:
    """Complete or undo a save that was killed between its renames; see `write_lora`.

    Raises:
        UserError: when the folder cannot be written.
    """
    if (folder / CONFIG).exists() or not any(folder.glob(_SCRATCH)):
        return
    with saving(folder, LORA):
        pass


def check_lora(folder: Path) -> None:
    """Check that both files are there and complete; peft's files have no checksum.

    Raises:
        UserError: if one is missing, truncated or damaged, or cannot be read.
    """
    try:
        if not isinstance(load_json(folder / CONFIG), dict):
            raise ValueError(f"{CONFIG} holds no settings")
        with (folder / TENSORS).open("rb"):  # because safetensors calls every file missing that it cannot open
            pass
        with safe_open(folder / TENSORS, framework="pt"):
            pass  # compares the header with the size of the file
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {Path(error.filename).name}: save the adapter again") from None
    except OSError as error:
        raise unreadable(error.filename or folder, error) from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds a damaged LoRA adapter ({first_line(error)}): save it again") from None


def _settle(folder: Path) -> None:
    """If adapter_config.json is missing: that of a new adapter whose tensors are in place, or the old one."""
    started = list(folder.glob(_SCRATCH))
    if (folder / CONFIG).exists() or not started:
        return
    tensors = folder / TENSORS
    names = [_NEW.format(file_sha256(tensors)), _OLD] if tensors.is_file() else [_OLD]
    found = [one / name for name in names for one in started if (one / name).is_file()]
    if found:
        found[0].replace(folder / CONFIG)


LORA = Files(CONFIG, TENSORS, _SCRATCH, _DEAD, _settle)


def _has_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder has this configuration already."""
    try:
        return bool(json.loads((folder / CONFIG).read_text()) == config)
    except (OSError, ValueError, RecursionError):
        return False
