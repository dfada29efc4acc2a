"""The composed configuration as typed, checked dataclasses, and the key that names a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.distributed import world_size
from sparsegrad.errors import (
    UserError,
    check_choice,
    check_integer,
    check_number,
    check_text,
    fail,
    first_line,
)
from sparsegrad.methods.base import Method
from sparsegrad.models.config import ModelConfig
from sparsegrad.runs.keys import config_key
from sparsegrad.runs.names import with_current_names
from sparsegrad.runs.overrides import check_fields
from sparsegrad.tasks.base import DataConfig, Task

# Nodes of a composed configuration that are no part of a run; `cli` and the report use them.
BESIDE_RUN = ("sweep", "hparams", "evidence", "quiet", "verbose")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains.

    Attributes:
        lr: learning rate.
        batch_size: rows per process and backward pass; an optimizer step takes `grad_accumulation` of them.
        eval_batch_size: rows per forward pass of an evaluation; no score depends on it.
        grad_accumulation: backward passes per optimizer step.
        weight_decay: decoupled; 0 in the paper.
        precision: `fp32`; `bf16` (autocast; weights and optimizer stay float32); or `bf16_weights`: autocast, and
            frozen weights in bfloat16. Weights that train stay float32, so that small updates are not rounded away.
        train_rest: whether parameters outside the MLP weights and the head train.
        group_by_length: whether batches have rows of similar length, which saves padding: False; `shuffled`, such
            batches in random order; or True, as in transformers, where they get shorter over up to 50 batches. Where
            labels depend on the length, True can prevent learning for a long time.
        device: `auto`, `cpu` or `cuda`.
        schedule: of the learning rate: `constant` (GLUE), `cosine` (the paper's LLaMA runs) or `linear`, both to 0.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
        warmup_ratio: the same as a share of all steps, instead.
        rest_lr: learning rate of everything outside the MLP weights (of BitFit: of the head); null: `lr`, as in the
            paper.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
        parallel: what several processes share: `ddp` (each has all weights) or `fsdp2` (each has a part of each weight;
            for frozen weights, see `sparsegrad.trainer.parallel`).
    """

    lr: float
    batch_size: int
    eval_batch_size: int
    grad_accumulation: int
    weight_decay: float
    precision: str
    train_rest: bool
    group_by_length: bool | str
    device: str
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    rest_lr: float | None = None
    gradient_checkpointing: bool = False
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        check_number("train.lr", self.lr, above=0, below=10, remedy="common values are 1e-5 to 1e-3")
        check_integer("train.batch_size", self.batch_size, at_least=1)
        check_integer("train.eval_batch_size", self.eval_batch_size, at_least=1)
        check_integer("train.grad_accumulation", self.grad_accumulation, at_least=1)
        check_number("train.weight_decay", self.weight_decay, at_least=0, below=1, remedy="the paper takes 0")
        check_choice("train.precision", self.precision, ("fp32", "bf16", "bf16_weights"))
        check_choice("train.schedule", self.schedule, ("constant", "cosine", "linear"))
        check_integer("train.warmup_steps", self.warmup_steps, at_least=0)
        check_number("train.warmup_ratio", self.warmup_ratio, at_least=0, below=1)
        if self.warmup_steps and self.warmup_ratio:
            raise fail("train.warmup_ratio", self.warmup_ratio, "train.warmup_steps is set too", "give one of them")
        if self.rest_lr is not None:
            check_number("train.rest_lr", self.rest_lr, above=0, below=10, remedy="null takes train.lr")
        check_choice("train.gradient_checkpointing", self.gradient_checkpointing, (True, False))
        check_choice("train.train_rest", self.train_rest, (True, False))
        check_choice("train.group_by_length", self.group_by_length, (False, "shuffled", True))
        check_choice("train.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("train.parallel", self.parallel, ("ddp", "fsdp2"))


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How long a run trains, when it evaluates, and which rows choose the best checkpoint.

    Attributes:
        name: its name in records and tables.
        select: `validation` (the paper) or `heldout`: a tenth of the training data; the validation split is then
            evaluated once, with the chosen checkpoint.
        epochs: at most.
        max_steps: at most, instead of `epochs`; null: no such limit.
        eval_steps: steps between evaluations; null: the authors' int(task.eval_base * 16 / batch_size).
        patience: evaluations without improvement before stopping; null: never.
        patience_from: evaluations before this step do not count for `patience`; no effect without it.
        eval_at_start: whether the untrained model is evaluated too.
        watch_validation: with `heldout`, score the validation split at every evaluation too, without a part in any
            choice: the record then has the value of both protocols.
    """

    name: str
    select: str
    epochs: float
    max_steps: int | None
    eval_steps: int | None
    patience: int | None
    patience_from: int = 0
    eval_at_start: bool = False
    watch_validation: bool = False

    def __post_init__(self) -> None:
        check_choice("protocol.select", self.select, ("validation", "heldout"))
        check_choice("protocol.watch_validation", self.watch_validation, (True, False))
        if self.watch_validation and self.select != "heldout":
            raise UserError(
                "protocol.watch_validation=true has no effect with protocol.select=validation, which scores that split "
                "anyway: leave it out, or choose protocol=both"
            )
        check_number("protocol.epochs", self.epochs, above=0)
        check_choice("protocol.eval_at_start", self.eval_at_start, (True, False))
        for name in ("max_steps", "eval_steps", "patience"):
            if getattr(self, name) is not None:
                check_integer(f"protocol.{name}", getattr(self, name), at_least=1, remedy="null leaves it out")
        check_integer("protocol.patience_from", self.patience_from, at_least=0)

    def steps_between_evaluations(self, eval_base: int, batch_size: int, total: int) -> int:
        """The interval in steps; at least one evaluation falls within `total` steps."""
        return max(1, min(self.eval_steps or eval_base * 16 // batch_size, total))


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where curves go besides the record: `none`, `wandb` or `tensorboard`.

    Attributes:
        project: of Weights & Biases.
        mode: of Weights & Biases: `offline` or `online`.
    """

    name: str
    project: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        check_choice("tracker.name", self.name, ("none", "wandb", "tensorboard"))
        check_choice("tracker.mode", self.mode, (None, "offline", "online"), none="null")
        if self.project is not None:
            check_text("tracker.project", self.project)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, composed from conf/config.yaml; `resolved` is the same as plain data."""

    model: ModelConfig
    method: Method
    task: Task
    data: DataConfig
    train: TrainConfig
    protocol: ProtocolConfig
    tracker: TrackerConfig
    seed: int
    name: str
    results_dir: str
    work_dir: str
    force: bool
    resume: bool
    save_model: bool
    save_adapter: str | None
    adapter_rank: int | None
    resolved: dict[str, Any]

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, at_least=0, at_most=2**32 - 1)
        check_text("name", self.name)
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise fail("name", self.name, "give one folder name, such as quickstart")
        check_text("results_dir", self.results_dir)
        check_text("work_dir", self.work_dir)
        check_choice("save_adapter", self.save_adapter, (None, "lora", "sparsegrad", "peft"), none="null")
        if self.adapter_rank is not None:
            check_integer("adapter_rank", self.adapter_rank, at_least=1)
            if self.save_adapter != "lora":
                raise fail("adapter_rank", self.adapter_rank, "only a LoRA has a rank", "set save_adapter=lora too")
        for name in ("force", "resume", "save_model"):
            check_choice(name, getattr(self, name), (True, False))

    @property
    def key(self) -> str:
        """16 hex digits of everything that determines the result, without folders, tracker and device."""
        return config_key(self.resolved)

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether any products of training are in bfloat16."""
        return self.train.precision != "fp32" or getattr(self.method, "save_dtype", None) is not None

    @property
    def record_path(self) -> Path:
        """The file of this run's record."""
        return Path(self.results_dir) / "runs" / self.name / f"{self.key}.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, deleted when the run is complete."""
        return self.run_folder / "checkpoints"

    @property
    def adapter_folder(self) -> Path:
        """The folder of the adapter that `save_adapter` asks for; it stays, as a result."""
        return Path(self.results_dir) / "adapters" / self.name / self.key

    @property
    def run_folder(self) -> Path:
        """The folder for checkpoints and trackers during the run."""
        return Path(self.work_dir) / self.key


def build(config: DictConfig) -> RunConfig:
    """Resolve and check a composed configuration.

    Raises:
        UserError: for a value that is missing, of the wrong type or out of range.
    """
    try:
        config = with_current_names(config)
        resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {first_line(error)}") from None
    for name in BESIDE_RUN:
        resolved.pop(name, None)
    groups = {name: make(resolved.get(name), name) for name, make in _GROUPS.items()}
    processes = {"processes": world_size()} if world_size() > 1 else {}  # part of the key: another global batch
    flat = {name: value for name, value in resolved.items() if name not in groups}
    return cast(RunConfig, _make(RunConfig, {**groups, **flat, "resolved": {**resolved, **processes}}, ""))


def _make_target(node: Any, where: str) -> Any:
    """Create the object that a YAML names with `_target_: module.Class`."""
    node = _mapping(node, where)
    module, _, name = str(node.get("_target_", "")).rpartition(".")
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{where}._target_={module}.{name} cannot be imported: {error}") from None
    needed = _PARTS[where]
    if not isinstance(maker, type) or not all(hasattr(maker, part) for part in needed):  # never call anything else
        raise UserError(f"{where}._target_={module}.{name} is not a {where}: name a class with {' and '.join(needed)}")
    return _make(maker, {key: value for key, value in node.items() if key != "_target_"}, where)


def _make(maker: Any, node: Any, where: str) -> Any:
    fields = _mapping(node, where)
    check_fields(maker, fields, where, f"{where}={fields['name']}" if where in _CHOSEN and "name" in fields else where)
    try:
        return maker(**fields)
    except TypeError as error:
        raise UserError(
            f"{where or 'the configuration'} does not fit {maker.__name__}: {str(error).replace('.__init__()', '')}"
        ) from None


def _mapping(node: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        choose = f"choose one of conf/{where}, or " if where in _CHOSEN else ""
        raise UserError(f"{where}={node} is not allowed: {choose}set its fields with {where}.x=y")
    return node


_CHOSEN = ("model", "method", "task", "protocol", "tracker")  # nodes that a group of conf/ fills
_PARTS = {"method": ("check", "prepare"), "task": ("load", "tokens")}  # what a class of a group must have
_GROUPS: dict[str, Callable[[Any, str], Any]] = {
    "model": partial(_make, ModelConfig),
    "method": _make_target,
    "task": _make_target,
    "data": partial(_make, DataConfig),
    "train": partial(_make, TrainConfig),
    "protocol": partial(_make, ProtocolConfig),
    "tracker": partial(_make, TrackerConfig),
}
