"""Trainer callbacks: speed and memory of training alone, losses that are not finite, and progress bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from sparsegrad import progress
from sparsegrad.distributed import mark_shared
from sparsegrad.errors import FailedRunError
from sparsegrad.trainer.peak_memory import PeakMemory
from sparsegrad.trainer.processes import largest

WARM_UP_STEPS = 3  # not timed: the first steps allocate memory and choose kernels


class NonFiniteLossError(FailedRunError):
    """The training loss became NaN or infinite at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not a finite number at step {step}")
        self.step = step


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Measures seconds and peak memory of training steps, without evaluation, logging and saving; and the whole run.

    The first `WARM_UP_STEPS` of a process are not timed. Seconds and the peak of memory include those of the processes
    that the run continues, up to their last checkpoint.

    Attributes:
        began: time at which this process began the run, by `time.monotonic`.
    """

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory
        self.began = time.monotonic()
        self.seen = 0
        self.steps = 0
        self.seconds = 0.0
        self._before: float | None = 0.0  # seconds of the processes that the run continues; None: unknown
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

    def run_seconds(self) -> float | None:
        """Return the seconds of the whole run so far; None if it continues one that did not store them."""
        return None if self._before is None else round(self._before + time.monotonic() - self.began, 1)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this clock."""
        times = {"steps": self.steps, "seconds": round(self.seconds, 3), "run_seconds": self.run_seconds()}
        return {**times, "memory": self.memory.report()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Add what `state` returned in an earlier process; None for a checkpoint of an earlier version."""
        if state is None:
            self._before = None
            return
        self.steps, self.seconds = self.steps + int(state["steps"]), self.seconds + float(state["seconds"])
        self._before = None if state["run_seconds"] is None else float(state["run_seconds"])
        if "memory" in state:  # earlier versions did not store it
            self.memory.restore(state["memory"])

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


class RestoreLosses(TrainerCallback):  # type: ignore[misc]
    """Gives a resumed run the sum of the losses since the last log, so that its next log is the same."""

    def __init__(self, trainer: Trainer, loss: float, since: int) -> None:
        self.trainer, self.loss, self.since = trainer, float(loss), int(since)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore both values, which the Trainer has just set to zero."""
        self.trainer._tr_loss += self.loss
        self.trainer._globalstep_last_logged = self.since


class LossWatch(TrainerCallback):  # type: ignore[misc]
    """Counts finite losses on the device without waiting for it; raises before the next log, evaluation or save.

    Of several processes all raise, though only one may have such a loss: the others would wait for it.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._count = 0
        self._ends: list[tuple[int, int]] = []  # steps since the last check, with the losses up to each step's end

    def add(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch."""
        fine = torch.isfinite(loss.detach()).to(torch.int64)
        # Grows by one per loss until the first that is not finite, then stays constant.
        unbroken = fine if self._finite is None else fine * (self._finite == self._count)
        self._finite = unbroken if self._finite is None else self._finite + unbroken
        self._count += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check before a log, an evaluation, which would fail without naming the step, and a save.

        The processes agree on these events, so that each takes part in the comparison.

        Raises:
            NonFiniteLossError: with the step of the first loss of any process that is not finite.
        """
        # Not computed from the accumulation: the last step of an epoch may have fewer micro-batches.
        self._ends.append((state.global_step, self._count))
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        finite = -largest(-(self._count if self._finite is None else int(self._finite)))
        if finite < self._count:
            raise mark_shared(NonFiniteLossError(next(step for step, end in self._ends if end > finite)))
        self._ends.clear()


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows the progress of training and of evaluations, with the newest loss and scores.

    Args:
        announce: called once, after the first steps, with a line on the expected time of a longer training.
        forward_steps: duration of an evaluation in training steps, for the estimate until one has been measured.
    """

    def __init__(self, announce: Callable[[str], None] | None = None, forward_steps: float = 0.0) -> None:
        self.announce, self.forward_steps = announce, forward_steps
        self._training: progress.Job | None = None
        self._evaluation: progress.Job | None = None
        self._scores: dict[str, float] = {}
        self._seen, self._seconds, self._pauses = 0, 0.0, list[float]()
        self._begun = self._ended = 0.0
        self._is_pause = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar; a resumed training begins where it was."""
        self._training = progress.start("training", state.max_steps, unit="steps", done=state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of a step; what has passed since the last one, with an evaluation in it, was a pause."""
        self._begun = time.monotonic()
        if self._is_pause and self._seen:
            self._pauses.append(self._begun - self._ended)
        self._is_pause = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step and estimate the rest."""
        self._ended = time.monotonic()
        self._seen, self._seconds = self._seen + 1, self._seconds + self._ended - self._begun
        if self._training is None:
            return
        left = self._estimate(args, state)
        self._training.update(done=state.global_step, left=left)
        if self.announce is not None and self._seen > WARM_UP_STEPS and self._seconds > 1.0:
            if left > _WORTH_ANNOUNCING:
                self.announce(self._describe_estimate(left, state.max_steps))
            self.announce = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Count a batch of an evaluation, the first of which opens its bar."""
        if self._evaluation is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._evaluation = progress.start("evaluation", total, unit="batches")
        self._evaluation.step()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Close the bar of an evaluation."""
        self._is_pause = True
        self._end_evaluation()

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Close the bar of a prediction."""
        self._end_evaluation()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the newest numbers."""
        wanted = {name.removeprefix("eval_"): value for name, value in (logs or {}).items() if _is_worth_showing(name)}
        self._scores |= wanted
        if self._training is not None and wanted:
            self._training.update(note=", ".join(f"{name} {value:.3f}" for name, value in self._scores.items()))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self.close(completed=True)

    def close(self, *, completed: bool = False) -> None:
        """Close open bars, so that an error message starts on a new line."""
        self._end_evaluation()
        if self._training is not None:
            progress.stop(self._training, completed=completed)
        self._training = None

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            progress.stop(self._evaluation)
        self._evaluation = None

    def _estimate(self, args: Any, state: Any) -> float:
        """Seconds left: the steps and the evaluations still to come, the one that is reported included."""
        each = self._seconds / self._seen
        interval = max(1, int(args.eval_steps or state.max_steps))
        evaluations = -(-state.max_steps // interval) - state.global_step // interval + 1
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else each * self.forward_steps
        return each * float(state.max_steps - state.global_step) + pause * float(evaluations)

    def _describe_estimate(self, left: float, steps: int) -> str:
        speed = f"{self._seen / self._seconds:.2g} steps/s in the first {self._seen} steps"
        shorter = "; shorter: protocol.max_steps=200" if left > _LONG and steps > 200 else ""
        return f"about {progress.format_seconds(left)} ({speed}{shorter})"


_WORTH_ANNOUNCING = 10.0  # seconds
_LONG = 1800.0  # seconds from which the estimate says how to shorten the run


def _is_worth_showing(name: str) -> bool:
    return name == "loss" or (name.startswith("eval_") and not name.endswith(("runtime", "per_second", "loss")))
