"""Trackers of a run: Weights & Biases and TensorBoard, with the experiment as the run's configuration.

A run keeps its identity over interruptions: its key and name give the W&B run and the TensorBoard folder.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import Trainer, TrainerCallback

from sparsegrad.distributed import is_main, on_main
from sparsegrad.errors import ResourceError, first_line
from sparsegrad.hashing import json_sha256
from sparsegrad.optim.group_checks import is_sparse
from sparsegrad.optim.scratch import Scratch
from sparsegrad.optim.selection import select
from sparsegrad.runs.config import RunConfig
from sparsegrad.trainer.callbacks import Stopwatch

Numbers = dict[str, float]
_OFFLINE = "set tracker.mode=offline, and upload the run later with `wandb sync`"


@on_main
def check_login(config: RunConfig) -> None:
    """An online run of Weights & Biases has a key that the server accepts; in a terminal, wandb asks for a missing one.

    Raises:
        ResourceError: otherwise. No other `UserError`: a sweep would put it down to the trial's values.
    """
    if config.tracker.name != "wandb" or config.tracker.mode != "online":
        return
    import wandb as package

    wandb: Any = package
    try:
        # wandb's own search: environment, netrc and settings. Force: no choice of another mode than the one asked for.
        wandb.login(force=True, verify=True)
    except (wandb.errors.Error, ValueError) as error:  # earlier versions raise ValueError for a malformed key
        raise ResourceError(
            f"tracker.mode=online cannot log in to W&B ({first_line(error)}): run `wandb login`, or {_OFFLINE}"
        ) from None


@contextmanager
def tracked(config: RunConfig, trainer: Trainer, record: Mapping[str, Any], stopwatch: Stopwatch) -> Iterator[None]:
    """Within: the tracker that the configuration names follows the training; at the end it says how to open the run.

    Args:
        config: the run.
        trainer: receives the tracker as a callback.
        record: what is known before training; if it has a `result` at the end, this is logged too.
        stopwatch: the trainer's, for speed and memory.
    """
    if config.tracker.name == "none" or not is_main():
        yield
        return
    tracker = _TRACKERS[config.tracker.name](config, record, stopwatch)
    trainer.add_callback(tracker)
    try:
        yield
        tracker.write_result(record["result"], trainer.state.global_step)
    finally:
        tracker.close()
        print(f"{config.tracker.name}: {tracker.how_to_open()}", file=sys.stderr)


def run_title(config: RunConfig) -> str:
    """A readable name that is a valid folder: task, model, method, learning rate, seed, name, start of the key.

    The same settings under two names are two runs.
    """
    parts = (config.task.name, config.model.name, config.method.name, f"lr{config.train.lr:g}", f"seed{config.seed}")
    return "-".join((*parts, _clean(config.name), config.key[:6]))


def run_facts(config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration, with what the record adds to it under `record`."""
    method = config.resolved["method"]
    added = ("source", "batch", "data", "trainable", "calibration")
    return {
        **config.resolved,
        "key": config.key,
        "density": method.get("density"),
        "engine": method.get("engine"),
        "record": {"path": str(config.record_path), **{name: record[name] for name in added if name in record}},
    }


def hyperparameters(config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """What runs are compared by, as numbers and texts: TensorBoard's table has a column for each."""
    facts, train = run_facts(config, record), config.train
    found = {
        **{name: facts[name]["name"] for name in ("model", "method", "task", "protocol")},
        **{name: facts[name] for name in ("seed", "density", "engine", "key")},
        **{name: getattr(train, name) for name in ("lr", "batch_size", "train_rest", "precision", "schedule")},
        "epochs": config.protocol.epochs,
        "trainable": record["trainable"]["total"],
    }
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in found.items()}


class Tracker(TrainerCallback):  # type: ignore[misc]
    """What the trackers share; a subclass has `open`, `write`, `close` and `how_to_open`."""

    def __init__(self, config: RunConfig, record: Mapping[str, Any], stopwatch: Stopwatch) -> None:
        self.config, self.record, self.stopwatch = config, record, stopwatch
        self.is_open = False
        self._energy: dict[str, Tensor] = {}

    def open(self, step: int) -> None:
        """Begin the run, or continue it after `step`."""
        raise NotImplementedError

    def write(self, values: Numbers, step: int) -> None:
        """Log numbers of one step."""
        raise NotImplementedError

    def close(self) -> None:
        """End the run, if it was opened."""
        raise NotImplementedError

    def how_to_open(self) -> str:
        """The command or address that shows the run."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the run before its first step."""
        self._ensure_open(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Measure the kept energy of the steps that are logged, while their gradients exist."""
        if (state.global_step + 1) % args.logging_steps == 0:
            self._energy = kept_energy(optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Log what the Trainer logs, with speed, memory and kept energy."""
        values = {_rename(name): float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._ensure_open(state.global_step)
        self.write({**values, **self._measure()}, state.global_step)
        self._energy = {}  # of that step alone

    def write_result(self, result: Mapping[str, Any], step: int) -> None:
        """Log the scores of the finished run."""
        self._ensure_open(step)
        scores = {f"result/{name}": value for name, value in result["scores"].items() if value is not None}
        self.write({**scores, "result/chosen_step": float(result["chosen_step"])}, step)

    def _ensure_open(self, step: int) -> None:
        # A run that was killed between its last step and its record has nothing left to train: it opens at the end.
        if not self.is_open:
            self.open(step)
            self.is_open = True
            seconds = self.record.get("calibration", {}).get("seconds")
            if seconds is not None:  # no new calibration: none was needed, or a stored one was used
                self.write({"calibration/seconds": float(seconds)}, step)

    def _measure(self) -> Numbers:
        """Speed and peak memory so far, and the kept energy by layer kind."""
        speed = {"speed/steps_per_second": self.stopwatch.report()["steps_per_second"]}
        memory = {f"memory/{name}": value for name, value in self.stopwatch.memory.peak.items()}
        energy = {f"kept_energy/{kind}": float(share) for kind, share in self._energy.items()}
        return {name: value for name, value in {**speed, **memory, **energy}.items() if value is not None}


@torch.no_grad()
def kept_energy(optimizer: Any) -> dict[str, Tensor]:
    """Share of the squared gradient that the kept entries hold, of one weight per layer kind, from 0 to 1.

    Empty where the whole rotated gradient does not exist: with engines `layer` and `fast`, and with released gradients.
    """
    shares = {}
    for number, group in enumerate(optimizer.param_groups):
        weights = [weight for weight in group["params"] if weight.grad is not None and not weight.grad.is_sparse]
        if not is_sparse(group) or not weights:
            continue
        weight = weights[len(weights) // 2]  # one in the middle of the network: all of them would cost a step's time
        kept = select(group, [weight], optimizer.state, Scratch()).values
        # The bases are orthogonal: the rotated gradient has the norm of the gradient.
        total = weight.grad.to(kept.dtype).square().sum()
        shares[str(group.get("kind") or number)] = kept.square().sum() / total.clamp_min(1e-30)
    return shares


class WandbTracker(Tracker):
    """A run of Weights & Biases; offline runs are uploaded later with `wandb sync`."""

    def open(self, step: int) -> None:
        """Start the run, or continue the one of the same key and name.

        Raises:
            ResourceError: if wandb refuses, for example because its server cannot be reached.
        """
        import wandb as package

        wandb: Any = package
        tracker, folder = self.config.tracker, Path(self.config.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run: Any = wandb.init(
                project=tracker.project or "sparsegrad",
                mode=tracker.mode or "offline",
                id=_run_id(self.config),
                resume="allow",
                name=run_title(self.config),
                group=self.config.name,
                dir=str(folder),
                config=run_facts(self.config, self.record),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            remedy = f"repeat the command, or {_OFFLINE}" if tracker.mode == "online" else "set tracker=none"
            raise ResourceError(f"W&B cannot start the run ({first_line(error)}): {remedy}") from error

    def write(self, values: Numbers, step: int) -> None:
        """Log numbers; W&B ignores steps that it has already."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Finish the run; without a result it is marked failed."""
        if self.is_open:
            self.run.finish(exit_code=0 if "result" in self.record else 1)

    def how_to_open(self) -> str:
        """`wandb sync` with every folder of the run: each interruption starts a new one."""
        if not self.is_open:
            return "not started"
        if self.config.tracker.mode == "online":
            return str(self.run.url)
        folder = Path(self.config.work_dir, "wandb")
        return f"wandb sync {shlex.quote(str(folder))}/offline-run-*-{self.run.id}"


class TensorBoardTracker(Tracker):
    """Event files in `<work_dir>/tensorboard/<title>`; the experiment is a text and in the tab of hyperparameters."""

    def open(self, step: int) -> None:
        """Write the facts; events after `step`, of an interrupted run, are hidden."""
        from torch.utils import tensorboard
        from torch.utils.tensorboard import summary

        folder = self._folder / run_title(self.config)
        self.writer: Any = tensorboard.SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        facts = run_facts(self.config, self.record)
        # Indented: Markdown shows it as it is.
        text = "".join(f"    {line}\n" for line in OmegaConf.to_yaml(OmegaConf.create(facts)).splitlines())
        self.writer.add_text("experiment", text)
        # Not `add_hparams`: it makes a second run, in a folder below this one.
        make_table: Any = summary.hparams
        file: Any = self.writer.file_writer
        for part in make_table(hyperparameters(self.config, self.record), self._final_scores):
            file.add_summary(part)

    def write(self, values: Numbers, step: int) -> None:
        """Log numbers, so that an open TensorBoard shows them at once."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self.is_open:
            self.writer.close()

    def how_to_open(self) -> str:
        """TensorBoard on all runs of this folder, so that they can be compared."""
        return f"tensorboard --logdir {shlex.quote(str(self._folder))}"

    @property
    def _final_scores(self) -> Numbers:
        """The scores that the table of hyperparameters shows; their values come from `write_result`."""
        return {f"result/{self.config.task.main_metric}": 0.0}

    @property
    def _folder(self) -> Path:
        return Path(self.config.work_dir, "tensorboard")


_TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}


def _run_id(config: RunConfig) -> str:
    """Key and name; a run that is made anew on purpose does not continue the earlier one."""
    found = f"{config.key}-{_clean(config.name)}"
    return found if config.resume and not config.force else f"{found}-{datetime.now(UTC):%Y%m%d%H%M%S}"


def _clean(name: str) -> str:
    """A name, which may be long and have dots, spaces and other letters, for a folder or the id of a run."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return name if name == clean and len(name) <= 64 else f"{clean[:64]}-{json_sha256(name)[:6]}"


def _rename(name: str) -> str:
    """`eval_accuracy` -> `eval/accuracy`, all others below `train/`, as the Trainer's own trackers do."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
