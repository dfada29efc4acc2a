"""How the processes of one run share its model: whole on each (DDP), or cut into shards by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.distributed import reshard, world_size
from sparsegrad.errors import UserError
from sparsegrad.trainer.trainer import RunTrainer, report_unreadable

SCHEDULER = "scheduler.pt"
_ALTERNATIVES = (
    "use method=sparsegrad_fast, whose weights are frozen, or train.parallel=ddp, which keeps every weight whole"
)


def check_parallel(parallel: str, method: Any) -> None:
    """Check that the launcher, the number of processes and the method suit `train.parallel`.

    Args:
        parallel: `ddp` or `fsdp2`.
        method: the method, which `fsdp2` supports if it has `can_shard`.

    Raises:
        UserError: if they do not.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if launched and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP1 is not allowed: give accelerate launch --fsdp_version 2, and train.parallel=fsdp2")
    if launched and parallel != "fsdp2":
        raise UserError(
            "FSDP is not allowed with train.parallel=ddp: add train.parallel=fsdp2, or start with torchrun or "
            "accelerate launch --multi_gpu, which keep every weight whole (DDP)"
        )
    if parallel != "fsdp2":
        return
    if world_size() == 1:
        raise UserError("train.parallel=fsdp2 needs several processes: start with torchrun, or use train.parallel=ddp")
    if not getattr(method, "can_shard", False):
        raise UserError(
            f"train.parallel=fsdp2 is not allowed with method={method.name}: it needs whole weights or brings its own "
            f"layers; {_ALTERNATIVES}"
        )


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Cut the model into shards by FSDP2, in place: each block is a unit of its own, the rest is the last.

    The model may be on the CPU: then only the shards, and one unit at a time, ever occupy the device.

    Args:
        model: with its blocks in `ModuleList`s, as in `transformers`.
        device: of the training.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The shards are this function's alone: Accelerate would cut the model once more.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in _find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in the outermost `ModuleList`s."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _find_blocks(child)


class ShardedTrainer(RunTrainer):
    """The Trainer of a model that FSDP2 has sharded already, with distributed checkpoints.

    Every process writes its own shards of weights and moments, so no process ever holds all of them. The files are
    beside those of the Trainer and are sealed like them. Several machines need a common file system.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer's own way for models whose parameters are DTensors: neither DDP nor a second FSDP around them.
        self.is_distributed_loading_by_transformers = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only make the folder: the weights are written together with the moments."""
        if self.args.should_save:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._read_state(with_optimizer=True), checkpoint_id=output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any, **__: Any) -> None:
        with report_unreadable(resume_from_checkpoint):
            self._load_state(resume_from_checkpoint, with_optimizer=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with report_unreadable(checkpoint):
            self._load_state(checkpoint, with_optimizer=True)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _read_best_model(self, best: str) -> None:
        self._load_state(best, with_optimizer=False)

    def _load_state(self, checkpoint: str, with_optimizer: bool) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        state = self._read_state(with_optimizer)
        load(state, checkpoint_id=checkpoint)  # into the shards of this process
        set_model_state_dict(self.model, state["model"])
        if with_optimizer:
            set_optimizer_state_dict(self.model, self._plain_optimizer, state["optimizer"])

    def _read_state(self, with_optimizer: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        reshard(self.model)  # after an evaluation, which leaves the last unit whole
        state: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        if with_optimizer:
            state["optimizer"] = get_optimizer_state_dict(self.model, self._plain_optimizer)
        return state

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside Accelerate's."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduce the gradients of each micro-batch at once: deferred, they would be stored whole."""
        yield
