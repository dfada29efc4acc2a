"""Early stopping that begins to count after a while."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerState


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """Stop after some evaluations in a row without improvement, not counting those before a given step.

    A model that predicts one class for its first hundreds of steps, as on CoLA, has the same score in all of their
    evaluations and would be stopped before it learns anything.

    Args:
        early_stopping_patience: evaluations without improvement before stopping.
        early_stopping_threshold: by how much a better score must be better.
        start: evaluations before this step are not counted.
    """

    def __init__(
        self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0, start: int = 0
    ) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.start = start

    def on_evaluate(self, args: Any, state: TrainerState, *rest: Any, **more: Any) -> None:
        """Count the evaluation, or not."""
        if state.global_step >= self.start:
            super().on_evaluate(args, state, *rest, **more)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, from which a resumed run makes this callback."""
        found: dict[str, Any] = super().state()
        found["args"]["start"] = self.start
        return found


def make_early_stopping(patience: int, start: int) -> EarlyStoppingCallback:
    """transformers' own callback unless `start` needs another: checkpoints name the class that continues them."""
    return EarlyStopping(patience, start=start) if start else EarlyStoppingCallback(patience)
