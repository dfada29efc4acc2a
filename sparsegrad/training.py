"""The Hugging Face Trainer put together for one run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparsegrad.callbacks import EvaluationSteps, LossWatch, Progress, Stopwatch
from sparsegrad.checkpoints import PREFIX, last_checkpoint, load_state, prune, read_manifest, seal
from sparsegrad.config import RunConfig, TrainConfig
from sparsegrad.distributed import average_, is_main, rank, world_size
from sparsegrad.errors import UserError
from sparsegrad.last_batch import own_rows, weighted, without_labels
from sparsegrad.memory import PeakMemory
from sparsegrad.metrics import compute_metrics
from sparsegrad.metrics.language import token_losses
from sparsegrad.stopping import StopOnSignal

LOGGING_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class TokenSets:
    """Tokenized rows: what trains, what chooses the checkpoint, what is reported (None: the same); and their counts."""

    train: datasets.Dataset
    choose: datasets.Dataset
    report: datasets.Dataset | None
    counts: dict[str, Any] = field(default_factory=dict)


VALIDATION = "validation"  # prefix, in the log, of the scores that have no part in a choice


class RunTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, which also shows each loss to a `LossWatch`, and scores the rows `watched` at each evaluation."""

    def __init__(
        self,
        *args: Any,
        loss_watch: LossWatch,
        language: bool = False,
        watched: datasets.Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.watched = watched
        # A classifier takes any keyword, from which the Trainer concludes that its loss is already that of the whole
        # accumulated batch; it is not, and without this the micro-batches' gradients would be summed, not averaged.
        # A language model's loss is: a sum over the batch's tokens, divided by their number, as the Trainer gives it.
        self.model_accepts_loss_kwargs = language
        self.loss_watch = loss_watch
        self.add_callback(loss_watch)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train to the end, on from a checkpoint; the model is then the best one. An error leaves no bar open."""
        if resume_from_checkpoint is not None and self._is_done(resume_from_checkpoint):
            # Nothing was missing but the record; the Trainer would take one step too many.
            self._load_best_model()
            return
        try:
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()

    def _is_done(self, checkpoint: str) -> bool:
        """Whether the training had ended there: its state is then this trainer's; else only its losses are."""
        with _readable(checkpoint):
            state = load_state(checkpoint)
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                self.state = state
                return True
            self.add_callback(_Unlogged(self, **read_manifest(checkpoint)["unlogged"]))
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, forward and backward."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.loss_watch.add(loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; then the watched rows, into the log alone."""
        scores: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.watched is not None:
            found = self.predict(self.watched, metric_key_prefix=VALIDATION).metrics
            self.state.log_history.append({"step": self.state.global_step, "epoch": self.state.epoch, **found})
        return scores

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of one step, and for a language model the number of all processes' tokens."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        if self.model_accepts_loss_kwargs and batches and (share := self._own_rows()):
            batches[-1] = without_labels(batches[-1], share[0])
            tokens = self._get_num_items_in_batch(batches, self.args.device)
        return batches, tokens

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; of several processes' last batch of an epoch, only this one's share of the rows that are left."""
        last = model.training and self.accelerator.gradient_state.sync_gradients and not self.model_accepts_loss_kwargs
        share = self._own_rows() if last else None
        if share is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        rows, weight = weighted(inputs, *share)
        return super().compute_loss(model, rows, *args, **kwargs) * weight

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss, logits and labels of one batch; rows that fill a last one are cut off later, but not from its mean.

        A language model is scored by its tokens, not by this loss, which it takes all processes to compute.
        """
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if self.model_accepts_loss_kwargs:
            return loss, logits, labels
        own = (own_rows(self.accelerator.gradient_state, self.args.per_device_eval_batch_size) or (0, 0))[0]
        if 0 < own < self.args.per_device_eval_batch_size and loss is not None:
            rows = {name: value[:own] for name, value in inputs.items()}
            loss = super().prediction_step(model, rows, prediction_loss_only=True)[0]
        return loss, logits, labels

    def _own_rows(self) -> tuple[int, int] | None:
        return own_rows(self.accelerator.gradient_state, self.args.per_device_train_batch_size)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which would forget the best checkpoint if the folder has moved."""
        found = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, sealed, and with the losses that no log has averaged yet; then older ones go."""
        unlogged = {"loss": _mean_over_processes(self._tr_loss), "since": self._globalstep_last_logged}
        checkpoint = self._checkpoint(self.state.global_step)
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()  # each process wrote its own random state
            if self.args.should_save:
                seal(checkpoint, {"unlogged": unlogged})
                prune(checkpoint.parent, self.state.best_global_step)
        except Exception:
            shutil.rmtree(checkpoint, ignore_errors=True)  # on a full disk, what is half written only takes room
            raise

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX}{step}"

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """No norm where nothing is clipped: it would cost every step a pass, and COO gradients have none in torch."""
        return super()._get_grad_norm(*args, **kwargs) if self.args.max_grad_norm > 0 else None


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Within: whatever keeps a checkpoint from loading is the user's to know; its hashes were checked before."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files that somebody replaced, of another version of torch, or of another model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{checkpoint} cannot be loaded ({reason}): resume=false starts the run over") from error


class _Unlogged(TrainerCallback):  # type: ignore[misc]
    """Gives a continued run the sum of the losses since the last log, so that its next log is the same."""

    def __init__(self, trainer: RunTrainer, loss: float, since: int) -> None:
        self.trainer, self.loss, self.since = trainer, float(loss), int(since)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The Trainer has just set both to nothing."""
        self.trainer._tr_loss += self.loss
        self.trainer._globalstep_last_logged = self.since


def _mean_over_processes(loss: torch.Tensor) -> float:
    mean = loss.detach().clone()
    average_([mean])
    return float(mean)


def pick_device(name: str) -> torch.device:
    """The device of `train.device`.

    Raises:
        UserError: for `cuda` on a machine without it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda is not allowed: this machine has no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def training_batches(rows: datasets.Dataset, config: RunConfig, tokenizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of shuffled training batches, the same for the same seed: for calibration.

    Of several processes each gets its own rows of a batch of all.
    """
    generator, size = torch.Generator().manual_seed(config.seed), config.train.batch_size
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
) -> tuple[RunTrainer, Stopwatch]:
    """The Trainer of one run and the stopwatch that measures it."""
    stopwatch = Stopwatch(memory)
    callbacks: list[Any] = [stopwatch, EvaluationSteps(), stop or StopOnSignal()]
    if config.protocol.patience is not None:
        callbacks.append(EarlyStoppingCallback(config.protocol.patience))
    trainer = RunTrainer(
        model=model,
        args=training_arguments(config, len(sets.train)),
        train_dataset=sets.train,
        eval_dataset=sets.choose,
        data_collator=config.task.collator(tokenizer),
        compute_metrics=compute_metrics(config.task),
        preprocess_logits_for_metrics=token_losses if config.task.is_language else None,
        language=config.task.is_language,
        watched=sets.report if config.protocol.watch_validation else None,
        callbacks=callbacks,
        optimizers=(optimizer, None),
        loss_watch=LossWatch(),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    return trainer, stopwatch


def training_arguments(config: RunConfig, rows: int) -> TrainingArguments:
    """The run's settings in the Trainer's words: no clipping, as in the paper."""
    train, protocol = config.train, config.protocol
    interval = protocol.steps_between_evaluations(config.task.eval_base, train.batch_size, total_steps(config, rows))
    return TrainingArguments(
        output_dir=str(config.checkpoints),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        gradient_accumulation_steps=train.grad_accumulation,
        num_train_epochs=protocol.epochs,
        max_steps=protocol.max_steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type=_schedule(train),
        warmup_steps=train.warmup_steps,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        weight_decay=train.weight_decay,
        max_grad_norm=0,
        bf16=train.precision != "fp32",
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        eval_strategy="steps",
        eval_on_start=protocol.eval_at_start and last_checkpoint(config.checkpoints) is None,
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
        ddp_broadcast_buffers=False,  # none of them is trained: only gradients travel
        seed=config.seed,
        data_seed=config.seed,  # of several processes each draws its dropout from another seed, but rows from one
        report_to=_tracker(config),
        run_name=f"{config.name}/{config.model.name}/{config.method.name}/{config.task.name}/{config.seed}",
    )


def _schedule(train: TrainConfig) -> str:
    """The Trainer's name; its constant rate has no warm-up."""
    if train.schedule == "constant" and train.warmup_steps:
        return "constant_with_warmup"
    return train.schedule


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raise `UserError` for bfloat16 on a GPU that has none."""
    if device.type == "cuda" and config.train.precision != "fp32" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"train.precision={config.train.precision} is not allowed: {name} has no bfloat16 (compute capability 8.0 "
            "has); use train.precision=fp32"
        )


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps that the run may take at most."""
    if config.protocol.max_steps is not None:
        return config.protocol.max_steps
    micro_batches = -(-rows // (config.train.batch_size * world_size()))
    per_epoch = max(1, -(-micro_batches // config.train.grad_accumulation))
    return max(1, int(-(-per_epoch * config.protocol.epochs // 1)))


def check_tracker(config: RunConfig) -> None:
    """Raise `UserError` if the tracker's package is missing."""
    package = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(config.tracker.name)
    if package is None:
        return
    try:
        __import__(package)
    except ImportError:
        raise UserError(
            f"tracker={config.tracker.name} needs the package {package}: pip install 'sparsegrad[{package}]', "
            "or tracker=none"
        ) from None


def close_tracker(config: RunConfig) -> None:
    """End the run of Weights & Biases: the next one in this process is another."""
    if config.tracker.name == "wandb" and "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def _tracker(config: RunConfig) -> list[str]:
    """Set what the Trainer's trackers read from the environment, and name the tracker."""
    tracker = config.tracker
    if tracker.name == "wandb":
        folder = Path(config.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "WANDB_PROJECT": tracker.project or "sparsegrad",
            "WANDB_MODE": tracker.mode or "offline",
            "WANDB_RUN_GROUP": config.name,
            "WANDB_DIR": str(folder),
            "WANDB_SILENT": "true",
        }
    if tracker.name == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.work_dir) / "tensorboard" / config.key)
    return [] if tracker.name == "none" else [tracker.name]
