"""The two files of a peft adapter, written so that a loader never sees the tensors of one and the JSON of another."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sparsegrad.files import flush, save_tensors, unwritable, write_json

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


def write_lora(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files. After an error the folder holds the old adapter, complete.

    peft's file names are fixed, and two renames are not atomic. If the configuration differs, the old one is removed
    before the tensors are replaced: a process killed between two of these steps leaves a folder without
    adapter_config.json, which every loader refuses.

    Args:
        folder: created if needed.
        config: content of adapter_config.json.
        tensors: contiguous tensors by name, none of which share memory.

    Raises:
        UserError: when the folder cannot be written.
    """
    waiting, waiting_config = (folder / f".{name}.{os.getpid()}.new" for name in (TENSORS, CONFIG))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All that can fail for lack of space comes before the first change of the old adapter.
        save_tensors(tensors, waiting, {"format": "pt"})  # transformers and peft require this metadata
        flush(waiting)
        write_json(waiting_config, config)
        if not _has_config(folder, config):
            (folder / CONFIG).unlink(missing_ok=True)
        waiting.replace(folder / TENSORS)
        waiting_config.replace(folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder / TENSORS, error) from None
    finally:
        if folder.is_dir():
            waiting.unlink(missing_ok=True)
            waiting_config.unlink(missing_ok=True)


def _has_config(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder has this configuration already."""
    try:
        return bool(json.loads((folder / CONFIG).read_text()) == config)
    except (OSError, ValueError, RecursionError):
        return False
