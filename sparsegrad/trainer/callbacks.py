"""Trainer callbacks: speed and memory of training alone, losses that are not finite, and progress bars."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback

from sparsegrad.trainer.peak_memory import PeakMemory

WARM_UP_STEPS = 3  # not timed: the first steps allocate memory and choose kernels


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not a finite number at step {step}")
        self.step = step


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Measures seconds and peak memory of training steps, without evaluation, logging and saving.

    The first `WARM_UP_STEPS` of a process are not timed.
    """

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory
        self.seen = 0
        self.steps = 0
        self.seconds = 0.0
        self._mark = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock and the memory peak."""
        self._resume()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count one step; what follows until the next event may be evaluation or saving."""
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)  # kernels run asynchronously: wait for those of this step
        now = time.monotonic()
        self.seen += 1
        if self.seen > WARM_UP_STEPS:
            self.steps += 1
            self.seconds += now - self._mark
        self._mark = now
        self.memory.stop()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Resume: an evaluation has ended."""
        self._resume()

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Resume: a prediction has ended."""
        self._resume()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Resume: a checkpoint is written."""
        self._resume()

    def on_log(self, *_: Any, **__: Any) -> None:
        """Restart the clock alone: logging needs too little memory to matter."""
        self._mark = time.monotonic()

    def report(self) -> dict[str, Any]:
        """Return steps per second for the record; None if too few steps ran."""
        speed = self.steps / self.seconds if self.seconds else None
        return {
            "steps_per_second": None if speed is None else round(speed, 4),
            "timed_steps": self.steps,
            "timed_seconds": round(self.seconds, 3),
        }

    def _resume(self) -> None:
        self._mark = time.monotonic()
        self.memory.start()


class EvaluationSteps(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves after the last step, and logs the loss at each evaluation.

    Without it, the steps after the last regular evaluation would never be scored, and a resumed run would miss the
    losses between the last log and its checkpoint.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for an evaluation and a checkpoint at the end, and for a log with each."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        control.should_log = control.should_log or control.should_evaluate


class LossWatch(TrainerCallback):  # type: ignore[misc]
    """Counts finite losses on the device without waiting for it; raises before the next log, evaluation or save."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch."""
        fine = torch.isfinite(loss.detach()).to(torch.int64)
        # Grows by one per loss until the first that is not finite, then stays constant.
        unbroken = fine if self._finite is None else fine * (self._finite == self._count)
        self._finite = unbroken if self._finite is None else self._finite + unbroken
        self._count += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check before an evaluation, which would fail without naming the step, and before a save."""
        if control.should_log or control.should_evaluate or control.should_save:
            self.on_log(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise `NonFiniteLossError` with the step of the first bad loss."""
        finite = self._count if self._finite is None else int(self._finite)
        if finite < self._count:
            micro_batches_back = self._count - finite - 1
            raise NonFiniteLossError(state.global_step - micro_batches_back // args.gradient_accumulation_steps)


class Progress(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bars, with loss and scores beside the bar instead of one line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the newest numbers."""
        if self.training_bar is not None and logs:
            wanted = {name.removeprefix("eval_"): value for name, value in logs.items() if _is_worth_showing(name)}
            self._scores = {**getattr(self, "_scores", {}), **wanted}
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._scores.items()})

    def close(self) -> None:
        """Close open bars, so that an error message starts on a new line."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


def _is_worth_showing(name: str) -> bool:
    return name == "loss" or (name.startswith("eval_") and not name.endswith(("runtime", "per_second", "loss")))
