"""Build the Hugging Face Trainer of one run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainingArguments

from sparsegrad.device import pick_device
from sparsegrad.distributed import is_main, rank, world_size
from sparsegrad.metrics import compute_metrics
from sparsegrad.metrics.language import token_losses
from sparsegrad.runs.config import RunConfig, TrainConfig
from sparsegrad.runs.tokenized_splits import TokenSets
from sparsegrad.trainer.callbacks import EvaluationSteps, LossWatch, Progress, Stopwatch
from sparsegrad.trainer.early_stopping import make_early_stopping
from sparsegrad.trainer.parallel import ShardedTrainer
from sparsegrad.trainer.peak_memory import PeakMemory
from sparsegrad.trainer.signals import StopOnSignal
from sparsegrad.trainer.trainer import RunTrainer

LOGGING_STEPS = 10
log = logging.getLogger(__name__)


def training_batches(rows: datasets.Dataset, config: RunConfig, tokenizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of shuffled training batches, the same for the same seed: for calibration.

    With several processes, each gets its own rows of the common batch.
    """
    generator, size = torch.Generator().manual_seed(config.seed), config.train.batch_size
    # Otherwise the loader has no batch, and the loop below never ends; `tokenized_splits` checks it.
    assert len(rows) >= size * world_size()
    loader = DataLoader(
        rows,
        batch_size=size * world_size(),
        shuffle=True,
        drop_last=True,
        generator=generator,
        collate_fn=config.task.collator(tokenizer),
    )
    mine = slice(rank() * size, (rank() + 1) * size)
    while True:
        for batch in loader:
            yield {name: value[mine] for name, value in batch.items()}


def make_trainer(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sets: TokenSets,
    tokenizer: Any,
    memory: PeakMemory,
    stop: StopOnSignal | None = None,
    *,
    resuming: bool,
) -> tuple[RunTrainer, Stopwatch]:
    """Build the Trainer of one run, which may continue from a checkpoint, and the stopwatch that measures it."""
    if is_main():
        _warn_of_warm_up(config, len(sets.train))
    stopwatch = Stopwatch(memory)
    callbacks: list[Any] = [stopwatch, EvaluationSteps(), stop or StopOnSignal()]
    if config.protocol.patience is not None:
        callbacks.append(make_early_stopping(config.protocol.patience, config.protocol.patience_from))
    maker = ShardedTrainer if config.train.parallel == "fsdp2" else RunTrainer
    trainer = maker(
        model=model,
        args=training_arguments(config, len(sets.train), resuming=resuming),
        train_dataset=sets.train,
        eval_dataset=sets.choose,
        data_collator=config.task.collator(tokenizer),
        compute_metrics=compute_metrics(config.task),
        preprocess_logits_for_metrics=token_losses if config.task.is_language else None,
        language=config.task.is_language,
        multiplies_bfloat16=config.multiplies_bfloat16,
        shuffles_groups=config.train.group_by_length == "shuffled",
        watched=sets.report if config.protocol.watch_validation else None,
        callbacks=callbacks,
        optimizers=(optimizer, None),
        loss_watch=LossWatch(),
        stopwatch=stopwatch,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    return trainer, stopwatch


class OneDeviceArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments of a process that uses one device, however many it sees.

    With several visible GPUs and no launcher the Trainer would take `DataParallel`, and multiply the batch by their
    number: another run under the same key.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: 0 or 1."""
        return min(1, int(super().n_gpu))


def training_arguments(config: RunConfig, rows: int, *, resuming: bool) -> TrainingArguments:
    """Translate the run's settings for the Trainer. There is no clipping, as in the paper."""
    train, protocol = config.train, config.protocol
    interval = protocol.steps_between_evaluations(config.task.eval_base, train.batch_size, total_steps(config, rows))
    return OneDeviceArguments(
        output_dir=str(config.checkpoints),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        gradient_accumulation_steps=train.grad_accumulation,
        num_train_epochs=protocol.epochs,
        max_steps=protocol.max_steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type=_schedule(train),
        warmup_steps=_warmup_steps(config, rows),
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        weight_decay=train.weight_decay,
        max_grad_norm=0,
        bf16=train.precision != "fp32",
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        eval_strategy="steps",
        eval_on_start=protocol.eval_at_start and not resuming,
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{config.task.main_metric}",
        greater_is_better=config.task.greater_is_better,
        logging_steps=LOGGING_STEPS,
        logging_nan_inf_filter=False,
        disable_tqdm=not is_main(),
        dataloader_pin_memory=pick_device(train.device).type == "cuda",
        use_cpu=pick_device(train.device).type == "cpu",
        ddp_broadcast_buffers=False,  # no buffer is trained, so only gradients need to be sent
        seed=config.seed,
        data_seed=config.seed,  # processes differ in the seed of dropout, not in that of the order of rows
        report_to="none",  # `sparsegrad.runs.tracking` knows more of the run than the Trainer's own trackers
    )


def _schedule(train: TrainConfig) -> str:
    """The Trainer's name of the schedule; its `constant` has no warm-up."""
    if train.schedule == "constant" and (train.warmup_steps or train.warmup_ratio):
        return "constant_with_warmup"
    return train.schedule


def _warmup_steps(config: RunConfig, rows: int) -> int:
    return config.train.warmup_steps or round(config.train.warmup_ratio * total_steps(config, rows))


def _warn_of_warm_up(config: RunConfig, rows: int) -> None:
    """Log a warning if the warm-up, which some tasks set, takes the whole run: the rate never reaches `train.lr`."""
    warm_up, total = config.train.warmup_steps, total_steps(config, rows)
    if warm_up >= total:
        log.warning(
            "train.warmup_steps=%d is not shorter than the run, which has %d steps: the learning rate only rises, to "
            "%.0f %% of train.lr=%g; set a smaller one, such as train.warmup_steps=%d",
            *(warm_up, total, 100 * (total - 1) / warm_up, config.train.lr, total // 10),
        )


def total_steps(config: RunConfig, rows: int) -> int:
    """The largest number of optimizer steps that the run can take."""
    if config.protocol.max_steps is not None:
        return config.protocol.max_steps
    micro_batches = -(-rows // (config.train.batch_size * world_size()))
    per_epoch = max(1, -(-micro_batches // config.train.grad_accumulation))
    return max(1, int(-(-per_epoch * config.protocol.epochs // 1)))
