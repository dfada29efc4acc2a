"""One run from its configuration to its record, as a list of steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from sparsegrad.device import pick_device
from sparsegrad.distributed import is_main, on_main, rank
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.files import is_of_writing, unwritable, write_json
from sparsegrad.methods.base import Prepared
from sparsegrad.models.source import Sources
from sparsegrad.progress import job
from sparsegrad.runs.announcement import announce, announce_time
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.environment import describe_environment, finish_environment
from sparsegrad.runs.method_setup import prepare_method
from sparsegrad.runs.outcome import describe_run, score_run, write_failed
from sparsegrad.runs.parts import Parts, load_parts
from sparsegrad.runs.predictions import Arrays, describe_arrays, write_predictions
from sparsegrad.runs.preflight import check_run
from sparsegrad.runs.run_folder import prepare_checkpoints, remove_checkpoints, run_lock
from sparsegrad.runs.saving import save_results
from sparsegrad.runs.tracking import tracked
from sparsegrad.runs.trainer_setup import make_trainer
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.callbacks import Stopwatch
from sparsegrad.trainer.lineage import Lineage
from sparsegrad.trainer.log_history import history
from sparsegrad.trainer.peak_memory import PeakMemory
from sparsegrad.trainer.processes import connect, lost_process
from sparsegrad.trainer.signals import StopOnSignal
from sparsegrad.trainer.trainer import RunTrainer


def run(
    config: RunConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    labels: Mapping[str, Any] | None = None,
    announces: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Fine-tune as `config` says and write the record; or find that it exists.

    Args:
        config: the run.
        callbacks: further Trainer callbacks, such as one that reports to a sweep.
        labels: further fields of the record, such as study and trial.
        announces: whether it prints, before training, what it will do and, soon after, how long that will take.

    Returns:
        The record, and whether it is new.

    Raises:
        UserError: for whatever the user can mend; if training has begun, a record marked failed is left. A complete one
            that `force=true` was to replace stays.
        ResourceError: if a disk, a tracker or another process failed; the same command continues from the last
            checkpoint. Also if the checkpoints were made from something else, or the model or adapter could not be
            saved, which keeps them.
    """
    device = pick_device(config.train.device)
    with _explained_errors(config):
        connect(device)
        with run_lock(config):
            with job("reading the data"):
                checked = check_run(config, device)
            if checked.finished is not None:
                remove_checkpoints(config)  # the run may have been killed just after its record was written
                return checked.finished, False
            assert checked.splits is not None
            assert checked.sources is not None
            show = announces and is_main()
            record, arrays = _train(config, checked.splits, checked.sources, device, callbacks, labels or {}, show)
            write_record(config, record, arrays)
            remove_checkpoints(config)
            return record, True


@contextmanager
def _explained_errors(config: RunConfig) -> Iterator[None]:
    """Within: a full disk and a lost process become errors for the user."""
    try:
        yield
    except Exception as error:
        if is_of_writing(error, (config.work_dir, config.results_dir)):
            raise unwritable(config.run_folder, error) from error
        if (lost := lost_process(error)) is not None:
            raise lost from error
        raise


def _train(
    config: RunConfig,
    splits: Splits,
    sources: Sources,
    device: torch.device,
    callbacks: Sequence[TrainerCallback],
    labels: Mapping[str, Any],
    announces: bool,
) -> tuple[dict[str, Any], Arrays]:
    """Load, calibrate, train, evaluate and save; the record and the predictions."""
    environment, began = describe_environment(device), time.monotonic()  # now: the checkout may change during the run
    stop = StopOnSignal()
    with stop.listening():
        setup = _set_up(config, splits, sources, device, stop, announces)
        parts, trainer, stopwatch = setup.parts, setup.trainer, setup.stopwatch
        stopwatch.began = began  # the time of a run includes loading and calibration
        trainer.lineage = lineage = Lineage(environment)
        for callback in callbacks:
            trainer.add_callback(callback)
        record = describe_run(config, parts, splits, sources, setup.prepared, labels)
        with tracked(config, trainer, record, stopwatch):
            try:
                _run_trainer(config, trainer, setup.checkpoint)
                result, arrays = score_run(config, trainer, parts)
            except ResourceError:
                raise  # the run itself is sound: no failed record, and its checkpoints are kept
            except UserError as error:
                finished = finish_environment(environment, stopwatch.run_seconds(), lineage.describe())
                failure = write_failed(config, record, trainer, finished, error)
                failure.silent = error.silent  # where every process raises it, the main one prints it
                raise failure from None
            measured = {"speed": stopwatch.report(), "memory": stopwatch.memory.report()}
            record |= {"status": "complete", "result": result, **measured}
        if config.save_model or config.save_adapter:
            save_results(config, parts, setup.prepared, sources)
    finished = finish_environment(environment, stopwatch.run_seconds(), lineage.describe())
    record |= {"predictions": describe_arrays(arrays)}
    return {**record, **history(trainer.state.log_history), "environment": finished}, arrays


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What one run trains with; `checkpoint` is where it continues, None at the start."""

    parts: Parts
    prepared: Prepared
    trainer: RunTrainer
    stopwatch: Stopwatch
    checkpoint: str | None


def _set_up(
    config: RunConfig, splits: Splits, sources: Sources, device: torch.device, stop: StopOnSignal, announces: bool
) -> _Setup:
    """Load the model, prepare the method on it and build its Trainer."""
    checkpoint = prepare_checkpoints(config, splits, sources)
    with job("loading the model"):
        parts = load_parts(config, splits, sources, device)
    if announces:
        announce(config, parts.sets, checkpoint)
    memory = PeakMemory(device)
    resuming = checkpoint is not None
    prepared = prepare_method(config, parts, splits, sources, device, resuming=resuming)
    trainer, stopwatch = make_trainer(
        config, parts.model, prepared.optimizer, parts.sets, parts.tokenizer, memory, stop, resuming=resuming
    )
    if announces:
        announce_time(config, trainer, parts.sets)
    return _Setup(parts=parts, prepared=prepared, trainer=trainer, stopwatch=stopwatch, checkpoint=checkpoint)


def _run_trainer(config: RunConfig, trainer: RunTrainer, checkpoint: str | None) -> None:
    if not is_main():
        torch.manual_seed(config.seed + rank())  # rows of one batch must not share their dropout
    trainer.train(resume_from_checkpoint=checkpoint)


@on_main
def write_record(config: RunConfig, record: dict[str, Any], arrays: Arrays) -> None:
    """Write the record of a complete run; its predictions first, so that no complete record lacks them."""
    write_predictions(config.record_path, arrays)
    write_json(config.record_path, record)
