"""Write the histograms of token lengths from which the benchmark draws batches: `experiments/bench/lengths.json`.

    python scripts/token_lengths.py GLUE_FOLDER

GLUE_FOLDER contains `TASK/train.jsonl` with the hub's column names; snippets and the tokenizer are assets. Only lengths
are written, no texts or tokens.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer

from experiments.bench.lengths import LENGTHS
from sparsegrad.assets.download import asset_path
from sparsegrad.files import write_json

COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
MAX_LENGTH = 512


def main(glue: Path) -> None:
    """Tokenize every training row and count rows by length."""
    texts = {task: _rows(glue / task / "train.jsonl", columns) for task, columns in COLUMNS.items()}
    source = asset_path("snippets") / "movieReviewSnippets_GroundTruth.txt"
    texts["snippets"] = [[line.split("\t")[2]] for line in source.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(asset_path("minilm"))
    tasks = {task: _histogram(tokenizer, rows) for task, rows in texts.items()}
    about = f"training rows by number of BERT-uncased WordPieces with special tokens, cut at {MAX_LENGTH}"
    write_json(LENGTHS, {"about": about, "tasks": tasks})


def _rows(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    return [
        [row[column] for column in columns] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]


def _histogram(tokenizer: object, rows: list[list[str]]) -> dict[str, int]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    ids = tokenizer(*columns, truncation=True, max_length=MAX_LENGTH)["input_ids"]  # type: ignore[operator]
    return {str(length): count for length, count in sorted(Counter(map(len, ids)).items())}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
