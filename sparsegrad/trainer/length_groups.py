"""Batches of rows of similar length, in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ShuffledLengthGroups(LengthGroupedSampler):  # type: ignore[misc]
    """The batches of `LengthGroupedSampler`, shuffled.

    That sampler orders up to 50 batches from long rows to short ones, again and again. Where the label depends on the
    length, as in STS-B, the mean label drifts with them, and a model can follow this drift instead of learning the task
    (docs/evidence.md has an example). Here only an incomplete batch keeps its place, the last.

    The order depends on the seed and the epoch alone, so that it is the same in all processes.

    Args:
        batch_size: rows of a step, of all processes together.
        lengths: length of each row.
        seed: of the first epoch; each epoch has another one.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, as the Trainer and Accelerate do before they iterate."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        rows, size = torch.tensor(list(super().__iter__())), self.batch_size
        whole = len(rows) // size * size
        batches = rows[:whole].view(-1, size)
        yield from batches[torch.randperm(len(batches), generator=self.generator)].flatten().tolist()
        yield from rows[whole:].tolist()
