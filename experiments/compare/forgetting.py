"""What a language model forgets: its loss on general text before and after training.

    python -m experiments.compare.forgetting --texts <JSON lines with a text each>

Needs the adapters that the runs of compare_smollm2 leave, and those of evidence_smollm2 with
`ARGS=save_adapter=sparsegrad`. Each result is a file of its own
in results/compare/forgetting, named by the key of its run; what exists is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.adapter import load_adapter
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.hashing import SHORT, file_sha256

FOLDER = Path("compare") / "forgetting"
PLANS = ("compare_smollm2", "evidence_smollm2")  # whose runs may have left adapters
FIELDS = ("text", "output", "response")  # of a line, the first that exists


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 and one line after bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.forgetting")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines, each with a text (Alpaca: output)")
    parser.add_argument("--rows", type=int, default=200, help="texts from the start of the file (default: 200)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text (default: 128)")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        measure_all(options.results_dir, options.texts, options.rows, options.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_all(results: Path, texts: Path, rows: int, tokens: int) -> None:
    """Measure every complete run of the plan that has an adapter and no result.

    Raises:
        UserError: for a file without texts, or when no run has an adapter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsegrad.assets.download import asset_path

    found = read_texts(texts, rows)
    adapters = [one for plan in PLANS for one in sorted((results / "adapters" / plan).glob("*"))]
    if not adapters:
        raise UserError(
            f"{results / 'adapters'} has none of {' and '.join(PLANS)}: make compare TASKS=oasst1 makes them"
        )
    folder = asset_path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before: float | None = None
    for adapter in adapters:
        target = results / FOLDER / f"{adapter.name}.json"
        if target.is_file():
            continue
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = mean_loss(model, tokenizer, found, tokens) if before is None else before
        load_adapter(model, adapter).merge()
        after = mean_loss(model, tokenizer, found, tokens)
        about = {"texts": file_sha256(texts)[:SHORT], "rows": len(found), "tokens": tokens}
        write_json(target, {"before": round(before, 5), "after": round(after, 5), **about})
        print(f"{adapter.name}: {before:.4f} -> {after:.4f}", flush=True)


def read_texts(path: Path, rows: int) -> list[str]:
    """The first texts of a file of JSON lines, or of one JSON list such as Alpaca's."""
    try:
        content = path.read_text(encoding="utf-8")
        lines: list[Any] = json.loads(content) if content.lstrip().startswith("[") else [
            json.loads(line) for line in content.splitlines() if line.strip()
        ]  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give JSON lines or a JSON list") from None
    found = [next((str(line[name]) for name in FIELDS if line.get(name)), "") for line in lines]
    texts = [text for text in found if text][:rows]
    if not texts:
        raise UserError(f"{path} has no texts: give lines with one of {', '.join(FIELDS)}")
    return texts


@torch.no_grad()
def mean_loss(model: nn.Module, tokenizer: Any, texts: Sequence[str], tokens: int) -> float:
    """Mean loss per token of all texts, each cut to `tokens`."""
    total, count = 0.0, 0
    model.eval()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / max(count, 1)


def read_forgetting(results: Path) -> dict[str, dict[str, float]]:
    """Key of a run -> its losses `before` and `after`."""
    return {path.stem: read_json(path) for path in sorted((results / FOLDER).glob("*.json"))}


if __name__ == "__main__":
    sys.exit(main())
