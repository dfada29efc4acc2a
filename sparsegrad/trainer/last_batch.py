"""The last batch of an epoch with several processes, which `accelerate` fills with rows from the epoch's start.

A single process does not fill it. So that several processes take the same step, the added rows have weight zero.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState  # type: ignore[import-untyped]

from sparsegrad.distributed import rank, world_size
from sparsegrad.tasks.language import IGNORED


def own_rows(state: GradientState, size: int) -> tuple[int, int] | None:
    """Return how many rows of a filled last batch are real: (of this process, of all); None for any other batch.

    Args:
        state: of `accelerate`; knows the data loader in use.
        size: rows per process of an ordinary batch.
    """
    if world_size() == 1 or not state.end_of_dataloader:
        return None
    # Not `state.remainder`: in an epoch resumed from a checkpoint it uses the batch size of one process for all.
    rest = len(state.active_dataloader.dataset) % (size * world_size())
    return None if rest == 0 else (min(max(rest - rank() * size, 0), size), rest)


def weighted(inputs: dict[str, Any], own: int, of_all: int) -> tuple[dict[str, Any], float]:
    """Return the real rows and the weight of their mean loss.

    With these weights the mean over processes is the mean over the `of_all` rows. Every process takes part in the
    averaging: one without real rows keeps one row of weight 0.
    """
    return {name: value[: max(own, 1)] for name, value in inputs.items()}, own * world_size() / of_all


def without_labels(inputs: dict[str, Any], own: int) -> dict[str, Any]:
    """Return a language model's batch (rows, length) in which the rows after the first `own` have no labels."""
    labels = inputs["labels"].clone()
    labels[own:] = IGNORED
    return {**inputs, "labels": labels}
