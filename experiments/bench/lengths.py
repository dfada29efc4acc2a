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
_GROUP = 50  # batches that are sorted by length together, as `group_by_length` of `transformers` does


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
    """Token lengths of the rows of `count` batches.

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
    # Sorting needs a full group of batches, even if fewer are asked for.
    lengths = _draw(task, batch * max(count, _GROUP if padding == "longest" else 0), generator).clamp(max=most)
    if padding == "longest":
        lengths = _grouped(lengths, batch, generator)
    return [rows.tolist() for rows in lengths.view(-1, batch)][:count]


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


def _grouped(lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Sort rows within groups of batches, then shuffle whole batches."""
    groups = [group.sort(descending=True).values for group in torch.split(lengths, batch * _GROUP)]
    batches = torch.cat(groups).view(-1, batch)
    return batches[torch.randperm(len(batches), generator=generator)].flatten()
