"""The last batch of an epoch, of several processes: `accelerate` fills it up with rows of the epoch's beginning.

One process would not: so that several take the same step, rows that only fill count nothing.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState  # type: ignore[import-untyped]

from sparsegrad.distributed import rank, world_size
from sparsegrad.tasks.language import IGNORED


def own_rows(state: GradientState, size: int) -> tuple[int, int] | None:
    """Rows of this process and of all, in a last batch that is not `size` rows for each process; else None.

    Counted here: `state.remainder` is wrong in an epoch that a checkpoint continues (`accelerate` then takes the batch
    of one process for that of all).
    """
    if world_size() == 1 or not state.end_of_dataloader:
        return None
    rest = len(state.active_dataloader.dataset) % (size * world_size())
    return None if rest == 0 else (min(max(rest - rank() * size, 0), size), rest)


def weighted(inputs: dict[str, Any], own: int, of_all: int) -> tuple[dict[str, Any], float]:
    """The rows that count and the weight of their mean loss, so that the mean over processes is that over `of_all`.

    Every process takes part in the averaging: one without rows keeps one, of weight 0.
    """
    return {name: value[: max(own, 1)] for name, value in inputs.items()}, own * world_size() / of_all


def without_labels(inputs: dict[str, Any], own: int) -> dict[str, Any]:
    """A language model's batch in which rows that only fill have no token to predict."""
    labels = inputs["labels"].clone()
    labels[own:] = IGNORED
    return {**inputs, "labels": labels}
