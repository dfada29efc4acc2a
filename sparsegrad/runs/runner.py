"""One run from its configuration to its record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, set_seed

from sparsegrad.distributed import is_main, rank, world_size
from sparsegrad.errors import BusyError, UserError
from sparsegrad.files import check_writable, is_of_writing, unwritable, write_json
from sparsegrad.methods.base import Context, Prepared
from sparsegrad.runs.basis_cache import BasisStore
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.environment import describe_environment, now
from sparsegrad.runs.layer_choice import dense_weights, select_linears
from sparsegrad.runs.memory_estimate import check_memory
from sparsegrad.runs.model_loading import load_model, load_tokenizer
from sparsegrad.runs.process_checks import check_processes
from sparsegrad.runs.records import SCHEMA, find_complete
from sparsegrad.runs.tokenized_splits import check_sizes, log_counts, token_sets
from sparsegrad.runs.trainer_setup import (
    check_precision,
    check_tracker,
    close_tracker,
    make_trainer,
    training_batches,
)
from sparsegrad.targets import Linears, find_mlp
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.callbacks import NonFiniteLossError
from sparsegrad.trainer.checkpoints import last_checkpoint, weights_fingerprint
from sparsegrad.trainer.device import pick_device
from sparsegrad.trainer.log_history import best_on_validation, evaluations, history, scores_of
from sparsegrad.trainer.peak_memory import PeakMemory
from sparsegrad.trainer.processes import from_main, lost_process
from sparsegrad.trainer.signals import StopOnSignal
from sparsegrad.trainer.trainer import RunTrainer


def run(
    config: RunConfig, *, callbacks: Sequence[TrainerCallback] = (), labels: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], bool]:
    """Fine-tune as `config` says and write the record; or find that it exists.

    Args:
        config: the run.
        callbacks: further Trainer callbacks, such as one that reports to a sweep.
        labels: further fields of the record, such as study and trial.

    Returns:
        The record, and whether it is new.

    Raises:
        UserError: for whatever the user can mend; if training has begun, a record marked failed is left.
    """
    check_writable(config.record_path.parent)
    check_writable(config.run_folder.parent)
    check_tracker(config)
    device = pick_device(config.train.device)
    check_precision(config, device)
    try:
        check_processes(config, device)
        lock = run_lock(config)
        from_main(lambda: _acquire(lock, config.key))
        try:
            return _run_locked(config, device, callbacks, labels or {})
        finally:
            lock.release()
    except Exception as error:
        if is_of_writing(error, (config.work_dir, config.results_dir)):
            raise unwritable(config.run_folder, error) from error
        if (lost := lost_process(error)) is not None:
            raise lost from error
        raise
    finally:
        close_tracker(config)


def _acquire(lock: FileLock, key: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"run {key} is at work in another process: wait for it, or stop it") from None


def run_lock(config: RunConfig) -> FileLock:
    """Held while a run is at work: two processes must not write one checkpoint folder."""
    folder = Path(config.work_dir) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{config.key}.lock")


def _run_locked(
    config: RunConfig, device: torch.device, callbacks: Sequence[TrainerCallback], labels: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    found = None if config.force else from_main(lambda: find_complete(config.record_path))
    if found is not None:
        _check_same_data(config, found)
        _clear(config)  # it may have been killed just after its record was written
        return found, False
    splits = config.task.load(config.data)
    from_main(lambda: _prepare_folder(config, splits))
    stop = StopOnSignal()
    with stop.listening():
        record = _Run(config, splits, device, labels, stop).train(callbacks)
    from_main(lambda: write_json(config.record_path, record))
    _clear(config)
    return record, True


def _clear(config: RunConfig) -> None:
    """Remove what a finished run needs no more."""
    if is_main():
        shutil.rmtree(config.checkpoints, ignore_errors=True)
        if config.run_folder.is_dir() and not any(config.run_folder.iterdir()):
            config.run_folder.rmdir()


def _prepare_folder(config: RunConfig, splits: Splits) -> None:
    """The folder of checkpoints, empty if what it holds must not be continued: asked so, or made with other data."""
    marker = config.checkpoints / "data"
    same_data = marker.is_file() and marker.read_bytes() == splits.fingerprint.encode()
    if config.force or not config.resume or not same_data:
        shutil.rmtree(config.checkpoints, ignore_errors=True)
        config.checkpoints.mkdir(parents=True, exist_ok=True)
        marker.write_text(splits.fingerprint)


class _Run:
    """The parts of one run; made in order, cheap checks first."""

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        device: torch.device,
        labels: Mapping[str, Any],
        stop: StopOnSignal,
    ) -> None:
        self.config, self.splits, self.device, self.labels, self.stop = config, splits, device, labels, stop
        self.checkpoint = from_main(lambda: last_checkpoint(config.checkpoints))
        self.environment = describe_environment(device)  # now: the checkout may move on while the run lasts
        check_sizes(config, splits)
        set_seed(config.seed)  # before the model: heads and adapters are drawn from it
        self.tokenizer = load_tokenizer(config.model)
        self.bf16_weights = config.train.precision == "bf16_weights"
        dtype = torch.bfloat16 if self.bf16_weights else torch.float32
        self.model = load_model(config.model, config.task, self.tokenizer, dtype)
        found, chosen = find_mlp(self.model, config.model.mlp), config.model
        self.linears: Linears = select_linears(found, chosen.kinds, chosen.blocks)
        self.dense = dense_weights(found, chosen.dense, chosen.blocks, self.linears)
        config.method.check(self.linears)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.sets = token_sets(config, splits, self.tokenizer)
        if config.task.is_language:
            log_counts(splits.counts, self.sets.counts)
            check_memory(config, self.model, self.linears, device)
        self.model.to(device)

    def train(self, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
        """Prepare, train, evaluate; the record."""
        memory = PeakMemory(self.device)
        prepared = self._prepare()
        trainer, stopwatch = make_trainer(
            self.config, self.model, prepared.optimizer, self.sets, self.tokenizer, memory, self.stop
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        record = self._facts(prepared)
        try:
            result = self._train(trainer)
        except (NonFiniteLossError, UserError) as error:
            reason = f"{error}: training diverged; lower train.lr={self.config.train.lr:g}, or check the data"
            self._leave_failed(
                {**record, **history(trainer.state.log_history)},
                reason if isinstance(error, NonFiniteLossError) else str(error),
            )
        record |= {"status": "complete", "result": result, "speed": stopwatch.report(), "memory": memory.report()}
        if self.config.save_model:
            from_main(lambda: self._save(prepared))
        return {**record, **history(trainer.state.log_history), "environment": self._environment()}

    def _environment(self) -> dict[str, Any]:
        return {**self.environment, "finished": now()}

    def _prepare(self) -> Prepared:
        config = self.config
        self.model.train()
        model: Any = self.model
        if config.train.gradient_checkpointing:  # the calibration needs it as much as the training
            model.gradient_checkpointing_enable({"use_reentrant": False})
        named = ("transformers_version", "_name_or_path")  # the same architecture on any machine
        architecture = {name: value for name, value in model.config.to_dict().items() if name not in named}
        facts = {
            "linears": {kind: list(found) for kind, found in self.linears.items()},
            "architecture": architecture,
            "tokenizer": config.model.tokenizer or config.model.source,
            "data": self.splits.fingerprint,
            "protocol": config.protocol.select,
            "seed": config.seed,
            "batch_size": config.train.batch_size * world_size(),
            "pad": config.data.pad,
            "max_length": config.data.max_length,
            **config.task.token_facts,
        }
        store = BasisStore(
            folder=Path(config.work_dir) / "bases",
            model=self.model,
            facts=facts,
            own=config.checkpoints / "bases.safetensors",
            resuming=self.checkpoint is not None,
        )
        context = Context(
            lr=config.train.lr,
            weight_decay=config.train.weight_decay,
            train_rest=config.train.train_rest,
            is_head=lambda name: name in self.dense or (not config.task.is_language and config.model.is_head(name)),
            has_head=not config.task.is_language,
            batches=lambda: training_batches(self.sets.train, config, self.tokenizer),
            calibrated=store.calibrated,
            accumulation=config.train.grad_accumulation,
        )
        # Weights of two precisions in one model need autocast, in the calibration too.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16_weights):
            return config.method.prepare(self.model, self.linears, context)

    def _train(self, trainer: RunTrainer) -> dict[str, Any]:
        """Train to the end and score the best checkpoint, which is then the model."""
        if not is_main():
            torch.manual_seed(self.config.seed + rank())  # rows of one batch must not share their dropout
        trainer.train(resume_from_checkpoint=self.checkpoint)
        main, state = self.config.task.main_metric, trainer.state
        best = evaluations(state.log_history)
        chosen = next(row for row in best if row["step"] == state.best_global_step)
        scores = {name: value for name, value in chosen.items() if name not in ("step", "epoch", "loss")}
        if self.sets.report is not None:
            # Not `evaluate`: its log would put this split's scores among those that choose.
            scores = scores_of(trainer.predict(self.sets.report, metric_key_prefix="eval").metrics)
            scores.pop("loss")
        return {
            "metric": main,
            "value": scores[main],
            "split": "validation",
            "scores": scores,
            "chosen_on": self.config.protocol.select,
            "chosen_step": state.best_global_step,
            "chosen_score": state.best_metric,
            "steps": state.global_step,
            "epochs": round(state.epoch, 4),
            "weights": weights_fingerprint(self.model),
            **best_on_validation(state.log_history, self.config.task),
        }

    def _facts(self, prepared: Prepared) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "key": self.config.key,
            "status": "failed",
            **self.labels,
            "config": self.config.resolved,
            "data": {
                "fingerprint": self.splits.fingerprint,
                "train_rows": len(self.sets.train),
                "choose_rows": len(self.sets.choose),
                "validation_rows": len(self.splits.validation),
                **({"counts": {**self.splits.counts, **self.sets.counts}} if self.sets.counts else {}),
            },
            "trainable": {
                "total": prepared.trainable,
                "per_weight": prepared.trainable_per_weight,
                "model": self.parameters,
                "share": round(prepared.trainable / self.parameters, 6),
            },
            "calibration": prepared.calibration,
        }

    def _leave_failed(self, record: dict[str, Any], reason: str) -> None:
        """Write the failed record; a checkpoint on the way to NaN is of no use to the next try."""
        failed = {**record, "reason": reason, "environment": self._environment()}
        if is_main():  # the others may not fail, or not here
            write_json(self.config.record_path, failed)
            shutil.rmtree(self.config.checkpoints, ignore_errors=True)
        raise UserError(f"{reason} (record {self.config.record_path}, marked failed)") from None

    def _save(self, prepared: Prepared) -> None:
        prepared.finish()
        folder = self.config.run_folder / "model"
        model: Any = self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _check_same_data(config: RunConfig, record: Mapping[str, Any]) -> None:
    """Refuse to skip for a record of other data; where the data is not at hand, the record is taken at its word."""
    try:
        splits = config.task.load(config.data)
    except UserError:
        return
    found = record.get("data", {}).get("fingerprint")
    if found != splits.fingerprint:
        raise UserError(
            f"{config.record_path} was made with other data (fingerprint {found}, now {splits.fingerprint}): "
            "choose another name=, or force=true to replace it"
        )
