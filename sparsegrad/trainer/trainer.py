"""The Hugging Face Trainer with verified checkpoints, exact resume and exact last batches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from sparsegrad.distributed import average_, world_size
from sparsegrad.errors import ResourceError, UserError, first_line
from sparsegrad.files import unreadable
from sparsegrad.trainer.bfloat16 import fast_bfloat16
from sparsegrad.trainer.callbacks import LossWatch, Progress, RestoreLosses, Stopwatch
from sparsegrad.trainer.checkpoints import OR_RESTART, PREFIX, check_whole, load_state, prune, read_manifest, seal
from sparsegrad.trainer.last_batch import own_rows, weighted, without_labels
from sparsegrad.trainer.length_groups import RepeatableLengthGroups, ShuffledLengthGroups
from sparsegrad.trainer.lineage import Lineage
from sparsegrad.trainer.processes import is_of_connection

# Failures of memory or device, which say nothing about a checkpoint. The last one is missing in torch before 2.8.
_OF_DEVICE = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))
VALIDATION = "validation"  # prefix in the log of scores that do not choose the checkpoint


class RunTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, which also checks each loss and scores the rows `watched` at each evaluation.

    Args:
        loss_watch: receives the loss of each micro-batch.
        stopwatch: one of the callbacks, whose times checkpoints store; None: none.
        language: whether a causal language model is trained.
        watched: rows that are scored for the log alone; None: none.
        multiplies_bfloat16: whether products are in bfloat16 anywhere: see `fast_bfloat16`.
        shuffles_groups: whether batches of rows of similar length come in random order.
        *args, **kwargs: of the Trainer.

    Attributes:
        lineage: the processes of this run, which checkpoints store; None: none.
    """

    lineage: Lineage | None = None

    def __init__(
        self,
        *args: Any,
        loss_watch: LossWatch,
        stopwatch: Stopwatch | None = None,
        language: bool = False,
        watched: datasets.Dataset | None = None,
        multiplies_bfloat16: bool = False,
        shuffles_groups: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.watched, self.stopwatch = watched, stopwatch
        self._multiplies_bfloat16, self._shuffles_groups = multiplies_bfloat16, shuffles_groups
        self._groups: ShuffledLengthGroups | RepeatableLengthGroups | None = None
        self._redraw_from: str | None = None  # see `RepeatableLengthGroups`
        # What evaluations predicted, by step: the newest and the best, which need not be computed again at the end.
        self._predicted: dict[int, EvalLoopOutput] = {}
        # A classifier accepts any keyword, from which the Trainer concludes that its loss is divided by the size of the
        # whole accumulated batch. It is not: without this, gradients of micro-batches would be summed, not averaged.
        # The loss of a language model is: a sum over tokens, divided by the number that the Trainer passes.
        self.model_accepts_loss_kwargs = language
        self.loss_watch = loss_watch
        self.add_callback(loss_watch)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train to the end, from a checkpoint if given; afterwards the model is the best one. Bars are closed."""
        if resume_from_checkpoint is not None and self._is_done(resume_from_checkpoint):
            # Only the record is missing; the Trainer would run one step too many.
            if self.state.best_model_checkpoint is not None:
                self._load_best_model()
            return
        try:
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()

    def _is_done(self, checkpoint: str) -> bool:
        """Whether training had ended at the checkpoint: then restore its state, otherwise only its unlogged losses.

        Times and earlier processes are restored in either case.
        """
        with report_unreadable(checkpoint):
            state, manifest = load_state(checkpoint), read_manifest(checkpoint)
            if self.stopwatch is not None:
                self.stopwatch.restore(manifest.get("clock"))
            if self.lineage is not None:
                self.lineage.restore(manifest.get("processes"), state.global_step)
            self._redraw_from = manifest.get("drawn_from")
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                self.state = state
                return True
            self.add_callback(RestoreLosses(self, **manifest["unlogged"]))
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with report_unreadable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with report_unreadable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with report_unreadable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint if it is whole: without its file, the Trainer would keep the last weights."""
        best = self.state.best_model_checkpoint
        assert best is not None
        with report_unreadable(best):
            check_whole(Path(best))
            self._read_best_model(best)

    def _read_best_model(self, best: str) -> None:
        super()._load_best_model()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        if self._shuffles_groups:
            rows = sampler.batch_size * world_size()
            self._groups = ShuffledLengthGroups(rows, sampler.lengths, self.args.data_seed)
        else:
            self._groups = RepeatableLengthGroups(sampler.batch_size, sampler.lengths, self._redraw_from)
        return self._groups

    def get_train_dataloader(self) -> Any:
        """The Trainer's; shuffled groups are put where the epoch is set.

        With several processes, a run that is resumed within an epoch wraps the sampler so deep that neither the Trainer
        nor Accelerate would reach it: it would stay in the first epoch.
        """
        loader = super().get_train_dataloader()
        if isinstance(self._groups, ShuffledLengthGroups) and hasattr(loader, "set_sampler"):
            loader.set_sampler(self._groups)
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward on one micro-batch and check its loss."""
        with self._fast_products():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.loss_watch.add(loss)
        return loss

    def _fast_products(self) -> AbstractContextManager[None]:
        return fast_bfloat16(self.args.device) if self._multiplies_bfloat16 else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, then score the watched rows for the log alone."""
        scores: dict[str, float] = super().evaluate(*args, **kwargs)
        kept = (self.state.best_global_step, self.state.global_step)
        self._predicted = {step: found for step, found in self._predicted.items() if step in kept}
        if self.watched is not None:
            found = self.predict(self.watched, metric_key_prefix=VALIDATION).metrics
            self.state.log_history.append({"step": self.state.global_step, "epoch": self.state.epoch, **found})
        return scores

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run the Trainer's loop, and keep what an evaluation predicts; a prediction of other rows has another name."""
        with self._fast_products():
            found = super().evaluation_loop(*args, **kwargs)
        if kwargs.get("description") == "Evaluation":
            self._predicted[self.state.global_step] = found
        return found

    def predict_best(self) -> PredictionOutput | EvalLoopOutput:
        """What the best checkpoint, which is the model after training, predicts for the rows that chose it.

        Its evaluation has computed this, unless that was in an earlier process that this one continues.
        """
        found = self._predicted.get(self.state.best_global_step)
        return self.predict(self.eval_dataset, metric_key_prefix="eval") if found is None else found

    def visited_rows(self, rows: datasets.Dataset) -> list[int]:
        """The numbers of `rows` in the order of an evaluation: with `group_by_length` another one for each seed."""
        sampler = self._get_eval_sampler(self._remove_unused_columns(rows, description="evaluation"))
        return list(range(len(rows))) if sampler is None else list(sampler)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of one step, and for a language model the number of tokens of all processes."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        if self.model_accepts_loss_kwargs and batches and (share := self._count_own_rows()):
            batches[-1] = without_labels(batches[-1], share[0])
            # Counted again, without the tokens of the rows that only fill the batch.
            tokens = self._get_num_items_in_batch(batches, self.args.device)
        return batches, tokens

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; with several processes, the last batch of an epoch counts only this one's real rows."""
        last = model.training and self.accelerator.gradient_state.sync_gradients and not self.model_accepts_loss_kwargs
        share = self._count_own_rows() if last else None
        if share is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        rows, weight = weighted(inputs, *share)
        return super().compute_loss(model, rows, *args, **kwargs) * weight

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return loss, logits and labels of one batch.

        The Trainer drops the rows that fill a last batch from logits and labels, but not from the mean loss; that is
        computed again here. A language model is scored by its tokens, not by this loss.
        """
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if self.model_accepts_loss_kwargs:
            return loss, logits, labels
        share = own_rows(self.accelerator.gradient_state, self.args.per_device_eval_batch_size)
        if share is not None and loss is not None:
            # Every process, with or without such rows: a forward pass of a sharded model needs all of them.
            rows = {name: value[: max(share[0], 1)] for name, value in inputs.items()}
            of_own = super().prediction_step(model, rows, prediction_loss_only=True)[0]
            loss = of_own if share[0] else loss
        return loss, logits, labels

    def _count_own_rows(self) -> tuple[int, int] | None:
        return own_rows(self.accelerator.gradient_state, self.args.per_device_train_batch_size)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Restore the path of the best checkpoint: the Trainer would lose it if the folder has moved."""
        found = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self._checkpoint_path(self.state.best_global_step))
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Trainer does, with the losses since the last log; seal the checkpoint and delete older ones."""
        unlogged = {"loss": _average_over_processes(self._tr_loss), "since": self._globalstep_last_logged}
        checkpoint = self._checkpoint_path(self.state.global_step)
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.args.should_save:
                seal(checkpoint, {"unlogged": unlogged, **self._describe_process()})
                prune(checkpoint.parent, self.state.best_global_step)
        except Exception:
            shutil.rmtree(checkpoint, ignore_errors=True)  # on a full disk, an incomplete checkpoint only takes space
            raise

    def _describe_process(self) -> dict[str, Any]:
        """What a checkpoint stores of its process: times, environment, and the source of the order of an open epoch."""
        found: dict[str, Any] = {} if self.stopwatch is None else {"clock": self.stopwatch.state()}
        if self.lineage is not None:
            found["processes"] = self.lineage.state(self.state.global_step)
        if isinstance(self._groups, RepeatableLengthGroups) and self.state.epoch % 1:
            found["drawn_from"] = self._groups.drawn_from
        return found

    def _checkpoint_path(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX}{step}"

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Skip the norm if nothing is clipped: it costs a pass per step, and torch has none for COO gradients."""
        return super()._get_grad_norm(*args, **kwargs) if self.args.max_grad_norm > 0 else None


@contextmanager
def report_unreadable(checkpoint: str | None) -> Iterator[None]:
    """Turn errors of loading a checkpoint into a `ResourceError`; its hashes were checked before.

    Errors of memory, device and connection stay as they are: the checkpoint may be good.
    """
    try:
        yield
    except (UserError, *_OF_DEVICE):
        raise
    except OSError as error:
        raise unreadable(error.filename or checkpoint, error, OR_RESTART) from error
    except Exception as error:
        if is_of_connection(error):
            raise
        # Replaced files, or those of another torch version or model.
        raise ResourceError(
            f"{checkpoint} cannot be loaded ({first_line(error)}): restart the run with resume=false"
        ) from error


def _average_over_processes(loss: torch.Tensor) -> float:
    mean = loss.detach().clone()
    average_([mean])
    return float(mean)
