"""What several processes cannot do together in one run, told before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sparsegrad.distributed import world_size
from sparsegrad.errors import UserError
from sparsegrad.runs.config import RunConfig, config_key
from sparsegrad.trainer.checkpoints import MANIFEST, PREFIX
from sparsegrad.trainer.processes import check_same, connect, from_main

# What `accelerate launch` sets for engines that do not keep every weight whole, or bring an optimizer of their own.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}
_MOST = 256  # processes whose checkpoints are looked for


def check_processes(config: RunConfig, device: torch.device) -> None:
    """Connect the processes, if there are several, and refuse what they cannot do together.

    Raises:
        UserError: for a setting, an engine of the launcher, another configuration on another process, or a checkpoint
            that another number of processes left.
    """
    if world_size() > 1:
        _check_method(config)
        _check_launcher()
    connect(device)
    check_same("the configuration", config.key)
    from_main(lambda: _check_count(config))


def _check_method(config: RunConfig) -> None:
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


def _check_launcher() -> None:
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"{engine} is not allowed: a weight cut into shards cannot be rotated; start with torchrun, or "
                "accelerate launch --multi_gpu, which keep every weight whole (DDP)"
            )


def _check_count(config: RunConfig) -> None:
    """A run of another number of processes has another key: its checkpoints would be passed over in silence."""
    if config.force or not config.resume or config.record_path.exists() or _has_checkpoint(config.checkpoints):
        return
    for count in range(1, _MOST + 1):
        processes = {"processes": count} if count > 1 else {}
        settings = {name: value for name, value in config.resolved.items() if name != "processes"}
        folder = Path(config.work_dir) / config_key({**settings, **processes}) / "checkpoints"
        if _has_checkpoint(folder):
            raise UserError(
                f"{folder} is of this run with {_counted(count)}, and cannot be continued by {world_size()}: rows per "
                f"step, their order and the random states are those of {count}; start {_counted(count)}, or begin "
                "anew with resume=false"
            )


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob(f"{PREFIX}*/{MANIFEST}"))


def _counted(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
