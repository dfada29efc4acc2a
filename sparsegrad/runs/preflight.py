"""All checks of a run that need no model: one list, made before anything expensive starts.

Checks that need the model follow where it is loaded: `parts.load_parts`, `memory_estimate.check_memory`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsegrad.distributed import from_main, on_main, world_size
from sparsegrad.errors import UserError, fail, missing_package
from sparsegrad.files import check_writable
from sparsegrad.hashing import SHORT
from sparsegrad.models.source import Sources, find_sources
from sparsegrad.models.suitability import find_suitable_sources
from sparsegrad.progress import format_count
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.environment import name_device
from sparsegrad.runs.keys import config_key
from sparsegrad.runs.records import find_complete
from sparsegrad.runs.run_folder import hash_basis, is_own, is_unsaved
from sparsegrad.runs.saving import check_saving, restore_adapter
from sparsegrad.runs.tokenized_splits import describe_batch
from sparsegrad.runs.tracking import check_login
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.checkpoints import has_checkpoint
from sparsegrad.trainer.parallel import check_parallel
from sparsegrad.trainer.processes import check_same

# What `accelerate launch` sets for engines that do not keep every weight whole, or bring an optimizer of their own.
_SHARDING_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}
_MAX_PROCESSES = 256  # numbers of processes whose checkpoints are looked for


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks found.

    Attributes:
        finished: the record of this very run, complete; None if it has to run.
        sources: of model and tokenizer; None where a finished run's are not at hand.
        splits: the data; None where a finished run's data is not at hand.
    """

    finished: dict[str, Any] | None
    sources: Sources | None
    splits: Splits | None


def check_run(config: RunConfig, device: torch.device) -> Checked:
    """Check everything about a run that needs no model, cheapest first. All processes call it, connected.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_same("the configuration", config.key)
    check_writable(config.record_path.parent)
    check_writable(config.run_folder.parent)
    check_tracker_package(config)
    check_pooling(config)
    check_saving(config)
    restore_adapter(config)
    check_precision(config, device)
    check_settings_for_processes(config)
    check_launcher(config)
    check_process_count(config)
    finished = None if config.force else find_finished(config)
    if finished is None:
        check_login(config)
    sources = check_sources(config, finished)  # before the data: a gated model would be found out late
    check_basis(config, finished)
    splits = load_splits(config, finished)
    if finished is None:
        check_rows(config, splits)
    return Checked(finished=finished, sources=sources, splits=splits)


def check_tracker_package(config: RunConfig) -> None:
    """The tracker's package is installed."""
    name = config.tracker.name
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"{missing_package(f'tracker={name}', name, name)}, or set tracker=none")


def check_pooling(config: RunConfig) -> None:
    """Only a classifier's head pools."""
    if config.model.pooling is not None and config.task.is_language:
        raise fail("model.pooling", config.model.pooling, f"{config.task.name} has no head that pools", "use null")


def check_precision(config: RunConfig, device: torch.device) -> None:
    """A GPU that shall compute in bfloat16 can."""
    if device.type == "cuda" and config.train.precision != "fp32" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"train.precision={config.train.precision} is not allowed: {name_device(device)} has no bfloat16 "
            "(compute capability 8.0 has); use train.precision=fp32"
        )


@on_main
def check_settings_for_processes(config: RunConfig) -> None:
    """Several processes can train with this method, and see the same order of rows."""
    if world_size() == 1:
        return
    if config.train.group_by_length not in (False, "shuffled"):
        raise UserError(
            "train.group_by_length=true is not allowed with several processes: each would draw an order of its own, so "
            "that some rows come twice and others never; give shuffled, or false"
        )
    if getattr(config.method, "engine", "exact") == "layer":
        raise UserError(
            "method.engine=layer is not allowed with several processes: each would keep other entries of its own "
            "gradient; engine=exact selects once, from the gradient of all, and walks the same path"
        )
    if getattr(config.method, "release_gradients", False):
        raise UserError(
            "method.release_gradients=true is not allowed with several processes: their gradients are averaged after "
            "back-propagation; set it to false"
        )


@on_main
def check_launcher(config: RunConfig) -> None:
    """The launcher shares the model out among the processes as `train.parallel` says."""
    check_parallel(config.train.parallel, config.method)
    if world_size() == 1:
        return
    for variable, engine in _SHARDING_ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"{engine} is not allowed: a weight cut into shards cannot be rotated; start with torchrun, or "
                "accelerate launch --multi_gpu, which keep every weight whole (DDP)"
            )


@on_main
def check_process_count(config: RunConfig) -> None:
    """No checkpoint of this run is from another number of processes.

    The number is part of the key, so such a checkpoint would be passed over in silence.
    """
    if config.force or not config.resume or config.record_path.exists() or has_checkpoint(config.checkpoints):
        return
    settings = {name: value for name, value in config.resolved.items() if name != "processes"}
    for count in range(1, _MAX_PROCESSES + 1):
        processes = {"processes": count} if count > 1 else {}
        folder = Path(config.work_dir) / config_key({**settings, **processes}) / "checkpoints"
        if has_checkpoint(folder) and is_own(folder, config):
            by = "1 process" if count == 1 else f"{count} processes"
            raise UserError(
                f"{folder} is of this run with {by}, and cannot be continued by {world_size()}: rows per step, their "
                f"order and the random states are those of {count}; start {by}, or begin anew with resume=false"
            )


@on_main
def find_finished(config: RunConfig) -> dict[str, Any] | None:
    """The complete record of this run, if there is one and nothing is left to be saved from checkpoints."""
    return None if is_unsaved(config) else find_complete(config.record_path)


def check_sources(config: RunConfig, finished: Mapping[str, Any] | None) -> Sources | None:
    """The sources of model and tokenizer, which must have the content that a finished run's had.

    Where a finished run's are not at hand, or its record is of a version that did not note them, it counts as it is.

    Raises:
        UserError: for a source that cannot be had, of a model that the task cannot train, or one whose content has
            changed since the run finished.
    """
    if finished is None:
        return find_suitable_sources(config.model, config.task)
    before = finished.get("source")
    if not isinstance(before, Mapping):
        return None
    try:
        sources = find_sources(config.model, is_language=config.task.is_language)
    except UserError:
        return None
    for part, identity in sources.as_json().items():
        if before.get(part) != identity:
            raise UserError(
                f"{config.record_path} was made with another {part} of the same name ({before.get(part)}, now "
                f"{identity}): choose another name=, or force=true to replace it"
            )
    return sources


@on_main
def check_basis(config: RunConfig, finished: Mapping[str, Any] | None) -> None:
    """A finished run's file of bases has the content that it had.

    Where it is not at hand, or the record is of a version that did not note its hash, the record counts as it is.
    """
    calibration = (finished or {}).get("calibration") or {}
    before, now = calibration.get("sha256"), hash_basis(config)
    if before is not None and now is not None and before != now:
        raise UserError(
            f"{config.record_path} was made with another content of method.basis={calibration.get('file')} (sha256 "
            f"{before[:SHORT]}, now {now[:SHORT]}): choose another name=, or force=true to replace it"
        )


def load_splits(config: RunConfig, finished: Mapping[str, Any] | None) -> Splits | None:
    """The data, which a finished run must have been made with; where it is not at hand, its record counts as it is.

    Raises:
        UserError: for data that a new run cannot read, or other data than the finished run's.
    """
    if finished is None:
        return _load_in_turn(config)
    try:
        splits = _load_in_turn(config)
    except UserError:
        return None
    found = finished.get("data", {}).get("fingerprint")
    if found != splits.fingerprint:
        raise UserError(
            f"{config.record_path} was made with other data (fingerprint {found}, now {splits.fingerprint}): "
            "choose another name=, or force=true to replace it"
        )
    return splits


def _load_in_turn(config: RunConfig) -> Splits:
    """The data: the main process reads it first, from the hub if need be; the others then find it in the cache.

    A branch of the hub can move in between, so all must have read the same rows.
    """
    loaded: list[Splits] = []  # in the main process only
    from_main(lambda: loaded.append(config.task.load(config.data)))
    splits = loaded[0] if loaded else config.task.load(config.data)
    check_same("the data", splits.fingerprint)
    return splits


def check_rows(config: RunConfig, splits: Splits | None) -> None:
    """The training rows fill one batch of all processes; fewer are a mistake in the data or in `data.max_train`."""
    assert splits is not None  # a run that is not finished has its data
    share = 0.9 if config.protocol.select == "heldout" else 1.0
    rows = math.floor(len(splits.train) * share)
    if rows < config.train.batch_size * world_size():
        raise UserError(
            f"{describe_batch(config)} is not allowed: {config.task.name} has {format_count(rows, 'training rows')}; "
            "give more rows (data.max_train) or a smaller batch"
        )
    if len(splits.validation) < 2:
        raise UserError(
            f"{config.task.name} has {format_count(len(splits.validation), 'validation rows')}: give at least 2"
        )
