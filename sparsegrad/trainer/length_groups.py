"""Batches of rows of similar length: from long to short as in transformers, or in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class RepeatableLengthGroups(LengthGroupedSampler):  # type: ignore[misc]
    """`LengthGroupedSampler`, which knows how to draw the order of an epoch again, where a run continues within it.

    That sampler draws from torch's own generator. The Trainer restores its state from a checkpoint, but only after the
    order has been drawn.

    Args:
        batch_size: rows of a step.
        lengths: length of each row.
        redraw_from: `drawn_from` of the process that began the first epoch, for its order; None if this one begins it.

    Attributes:
        drawn_from: state of torch's generator, in hexadecimal digits, from which the order of this epoch was drawn;
            None before the first.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], redraw_from: str | None) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.drawn_from: str | None = None
        self._redraw_from = redraw_from

    def __iter__(self) -> Iterator[int]:
        if self._redraw_from is not None:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(self._redraw_from), dtype=torch.uint8))
            self._redraw_from = None
        self.drawn_from = torch.get_rng_state().numpy().tobytes().hex()
        yield from super().__iter__()


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
