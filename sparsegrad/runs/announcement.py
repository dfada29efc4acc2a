"""What a run says before it trains: what it is, its data, its steps, and where its record will be."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig

from sparsegrad.distributed import world_size
from sparsegrad.progress import format_count, remark
from sparsegrad.runs.config import ProtocolConfig, RunConfig
from sparsegrad.runs.names import name_method
from sparsegrad.runs.result_lines import LABEL
from sparsegrad.runs.tokenized_splits import TokenSets
from sparsegrad.runs.trainer_setup import total_steps
from sparsegrad.trainer.callbacks import Progress
from sparsegrad.trainer.trainer import RunTrainer


def announce(config: RunConfig, sets: TokenSets, checkpoint: str | None = None) -> None:
    """Print a line each on the run, what differs from the defaults, the data, the steps, and the record.

    Args:
        config: of the run.
        sets: its tokenized rows.
        checkpoint: where it continues; None at the start.
    """
    lines = {
        "run": describe_run_briefly(config),
        "changed": " ".join(list_changes()),
        "data": _describe_data(sets),
        "steps": _describe_steps(config, len(sets.train)) + ("" if checkpoint is None else _describe_start(checkpoint)),
        "record": str(config.record_path),
    }
    for name, text in lines.items():
        if text:
            remark(f"{name:<{LABEL}}{text}")


def announce_time(config: RunConfig, trainer: RunTrainer, sets: TokenSets) -> None:
    """Let the Trainer's progress print the expected time after the first steps; the bar updates it."""
    train = config.train
    rows = len(sets.choose) + (len(sets.report or ()) if config.protocol.watch_validation else 0)
    # A forward pass is about a third of a step; an evaluation has no other.
    forward_steps = rows / (train.batch_size * train.grad_accumulation * world_size()) / 3
    trainer.remove_callback(Progress)
    trainer.add_callback(Progress(lambda text: remark(f"{'time':<{LABEL}}{text}"), forward_steps))


def describe_run_briefly(config: RunConfig) -> str:
    """Model, method, task, learning rate and seed."""
    engine = getattr(config.method, "engine", None)
    density = getattr(config.method, "density", None)
    facts = [f"engine {engine}"] if engine else []
    facts += [f"density {density:g}"] if density else []
    details = f" ({', '.join(facts)})" if facts else ""
    names = f"{config.model.name} / {name_method(config.resolved['method'])}{details} / {config.task.name}"
    return f"{names}, lr {config.train.lr:g}, seed {config.seed}"


def list_changes() -> list[str]:
    """The overrides of the command line: what differs from the defaults."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _describe_data(sets: TokenSets) -> str:
    text = f"{len(sets.train):,} rows train, {len(sets.choose):,} choose the checkpoint"
    return text if sets.report is None else f"{text}, {len(sets.report):,} are reported"


def _describe_start(checkpoint: str) -> str:
    return f"; continues after step {int(checkpoint.rpartition('-')[2]):,}"


def _describe_steps(config: RunConfig, rows: int) -> str:
    train, protocol = config.train, config.protocol
    steps = total_steps(config, rows)
    interval = protocol.steps_between_evaluations(config.task.eval_base, train.batch_size, steps)
    evaluations = -(-steps // interval) + protocol.eval_at_start
    batch = format_count(train.batch_size * train.grad_accumulation * world_size(), "rows")
    most, stop = "", ""
    if protocol.patience is not None and _can_stop(protocol, steps, interval):
        count = format_count(protocol.patience, "evaluations") + (" in a row" if protocol.patience > 1 else "")
        most, stop = "at most ", f"; stops after {count} without improvement"
        stop += f", counted from step {protocol.patience_from:,} on" if protocol.patience_from else ""
    return f"{most}{steps:,} of {batch}, {format_count(evaluations, 'evaluations')}{stop}"


def _can_stop(protocol: ProtocolConfig, steps: int, interval: int) -> bool:
    """Whether early stopping can end the training before its last step; the first evaluation is always the best."""
    assert protocol.patience is not None
    begin = 0 if protocol.eval_at_start else interval
    later = range(begin, steps, interval)[1:]
    return sum(step >= protocol.patience_from for step in later) >= protocol.patience
