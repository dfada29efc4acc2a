"""General text, and a language model's loss on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError

FIELDS = ("text", "output", "response")  # of an entry, the first that exists


def read_texts(path: Path, rows: int) -> list[str]:
    """The first texts of a file of JSON lines, or of one JSON list such as Alpaca's.

    Raises:
        UserError: for a file that cannot be read, an entry that is no object, or a file without texts.
    """
    try:
        content = path.read_text(encoding="utf-8")
        lines: list[Any] = json.loads(content) if content.lstrip().startswith("[") else [
            json.loads(line) for line in content.splitlines() if line.strip()
        ]  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"TEXTS={path} cannot be read ({error}): give JSON lines or a JSON list") from None
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict):
            raise UserError(
                f"TEXTS={path}: entry {number} is {str(line)[:40]!r}, not an object: give each a field "
                f"{' or '.join(FIELDS)}"
            )
    found = [
        next((line[name] for name in FIELDS if isinstance(line.get(name), str) and line[name]), "") for line in lines
    ]
    texts = [text for text in found if text][:rows]
    if not texts:
        raise UserError(f"TEXTS={path} has no texts: give lines with one of {', '.join(FIELDS)}")
    return texts


@torch.no_grad()
def mean_loss(model: nn.Module, tokenizer: Any, texts: Sequence[str], tokens: int) -> float:
    """Mean loss per token of all texts, each cut to `tokens`; a text of one token has no loss."""
    total, count = 0.0, 0
    model.eval()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / max(count, 1)
