"""Batches of realistic shape: token lengths of real tasks, random tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsegrad.errors import check_choice

LENGTHS = Path(__file__).with_name("lengths.json")
PADDINGS = ("max_length", "longest", "none")
_GROUP = 50  # batches that are drawn, and with `longest` sorted by length, together, as `group_by_length` does


@cache
def histograms() -> dict[str, dict[int, int]]:
    """Task -> length in tokens -> number of rows of that length, as `scripts/token_lengths.py` counted them."""
    tasks = json.loads(LENGTHS.read_text())["tasks"]
    return {task: {int(length): rows for length, rows in found.items()} for task, found in tasks.items()}


def mean_length(task: str, most: int) -> float:
    """Mean tokens per row of `task`, rows cut at `most`."""
    found = histograms()[task]
    return sum(min(length, most) * rows for length, rows in found.items()) / sum(found.values())


def batch_lengths(task: str, batch: int, most: int, padding: str, count: int, seed: int) -> list[list[int]]:
    """Token lengths of the rows of `count` batches; a smaller count gives the first of them.

    Args:
        task: task whose lengths are drawn.
        batch, most: rows per batch; length at which a row is cut.
        padding: `max_length` and `longest` draw lengths, and `longest` puts rows of similar length into one batch;
            `none` fills every row.
        count, seed: number of batches; seed of the draw.

    Raises:
        UserError: for an unknown task or padding.
    """
    check_choice("padding", padding, PADDINGS)
    if padding == "none":
        return [[most] * batch for _ in range(count)]
    check_choice("task", task, tuple(histograms()))
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []
    while len(made) < count:  # whole groups, so that the batches do not depend on their number
        group = _draw(task, batch * _GROUP, generator).clamp(max=most)
        made += (_sorted(group, batch, generator) if padding == "longest" else group.view(-1, batch)).tolist()
    return made[:count]


def token_batch(lengths: list[int], width: int, vocabulary: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens: `input_ids` and `attention_mask` (rows, width), `labels` (rows,) of two classes."""
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)  # (rows, width), True where a token is real
    first = min(4, vocabulary - 1)  # smaller ids are special tokens of BERT and RoBERTa, such as padding
    ids = torch.randint(first, vocabulary, mask.shape, generator=generator)
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    # 1 is the padding id of RoBERTa, which derives positions from it; BERT only looks at the mask.
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long(), "labels": labels}


def _draw(task: str, count: int, generator: torch.Generator) -> Tensor:
    found = histograms()[task]
    rows = torch.tensor(list(found.values()), dtype=torch.float64)
    return torch.tensor(list(found))[torch.multinomial(rows, count, replacement=True, generator=generator)]


def _sorted(lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """The batches of a group: its rows sorted, then whole batches shuffled."""
    batches = lengths.sort(descending=True).values.view(-1, batch)
    return batches[torch.randperm(len(batches), generator=generator)]
