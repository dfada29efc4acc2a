"""Texts of a task as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_tasks import make, sample, write_jsonl

from sparsegrad.errors import UserError
from sparsegrad.tasks import DataConfig, tokenize


class FakeTokenizer:
    """Characters as tokens; pads and truncates as told."""

    model_max_length = 512
    pad_token: str | None = "."

    def __call__(self, *texts: list[str], truncation: bool, max_length: int, padding: str | bool) -> dict[str, Any]:
        assert truncation
        rows = [[ord(c) for c in "|".join(pair)][:max_length] for pair in zip(*texts, strict=True)]
        fill = [max_length - len(row) if padding == "max_length" else 0 for row in rows]
        return {
            "input_ids": [row + [0] * n for row, n in zip(rows, fill, strict=True)],
            "attention_mask": [[1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)],
        }


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_tokenize(name: str, tmp_path: Path) -> None:
    task = make(name)
    train = task.load(DataConfig(dir=str(write_jsonl(tmp_path, task, sample(task), sample(task))))).train
    dynamic = tokenize(train, task, FakeTokenizer(), DataConfig(max_length=6))
    padded = tokenize(train, task, FakeTokenizer(), DataConfig(max_length=32, pad="max_length"))
    assert set(dynamic.column_names) == {"input_ids", "attention_mask", "labels"}
    assert all(isinstance(value, float if task.is_regression else int) for value in dynamic["labels"])
    assert dynamic["labels"][:] == train["label"][:]
    assert max(map(len, dynamic["input_ids"])) <= 6
    assert {len(row) for row in padded["input_ids"]} == {32}
    assert min(map(sum, padded["attention_mask"])) < 32


def test_tokenize_refuses_what_the_tokenizer_cannot_do(tmp_path: Path) -> None:
    task, tokenizer = make("cola"), FakeTokenizer()
    train = task.load(DataConfig(dir=str(write_jsonl(tmp_path, task, sample(task), sample(task))))).train
    with pytest.raises(UserError, match=r"data\.max_length=513 .* at most 512 tokens"):
        tokenize(train, task, tokenizer, DataConfig(max_length=513))
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        tokenize(train, task, tokenizer, DataConfig(pad="max_length"))
