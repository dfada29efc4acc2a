"""Batches of rows of similar length, in random order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ShuffledLengthGroups(LengthGroupedSampler):  # type: ignore[misc]
    """The batches of `LengthGroupedSampler`, shuffled.

    That sampler orders up to 50 batches from long rows to short ones, again and again. Where the label depends on the
    length, as in STS-B, the mean label drifts with them. A model then follows the drift instead of learning the task:
    with MiniLM on STS-B, the correlation was near 0 or negative for 100 to 250 steps. Only an incomplete batch keeps
    its place, the last.
    """

    def __iter__(self) -> Iterator[int]:
        rows, size = torch.tensor(list(super().__iter__())), self.batch_size
        whole = len(rows) // size * size
        batches = rows[:whole].view(-1, size)
        # Like the sampler, from the generator of torch, whose state the Trainer restores when a run is resumed.
        order = torch.randperm(len(batches), generator=self.generator)
        yield from batches[order].flatten().tolist()
        yield from rows[whole:].tolist()
