"""The Hugging Face Trainer with what a run asks of it: sealed checkpoints, exact resume, exact last batches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from sparsegrad.distributed import average_
from sparsegrad.errors import UserError, first_line
from sparsegrad.trainer.callbacks import LossWatch, Progress
from sparsegrad.trainer.checkpoints import PREFIX, load_state, prune, read_manifest, seal
from sparsegrad.trainer.last_batch import own_rows, weighted, without_labels

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
        raise UserError(
            f"{checkpoint} cannot be loaded ({first_line(error)}): resume=false starts the run over"
        ) from error


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
