"""The figures of README's engine table are those of the committed benchmark."""

from __future__ import annotations

import json
import re

import pytest

from experiments.bench.results import summarise
from experiments.paths import ROOT

STACKS = ("mlp_768-b1x180", "mlp_768-b16x128-none-trained-fp32", "mlp_768-b32x128")  # 180, 2,048 and 4,096 tokens
MINILM = "minilm-b16x128"
# Row of the table -> (arm, `speed` or `memory`, reference, settings) of its figures, from left to right.
ROWS = {
    "`exact` (default)": ("exact", ("speed", "full", (*STACKS, MINILM)), ("memory", "full", (*STACKS, MINILM))),
    "`layer`": ("layer_regular", ("speed", "full", STACKS), ("memory", "full", STACKS)),
    "`exact` with `sides=small`": ("exact_small", ("speed", "full", STACKS), ("memory", "full", STACKS)),
    "`fast`": (
        "fast",
        ("speed", "full", STACKS),
        ("speed", "lora_peft", (*STACKS, MINILM)),
        ("memory", "lora_peft", (*STACKS, MINILM)),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_figure_is_measured(row: str) -> None:
    summary = summarise(json.loads((ROOT / "results" / "bench" / "cpu-2-amd-epyc.json").read_text(encoding="utf-8")))
    arm, *parts = ROWS[row]
    measured = []
    for of, reference, settings in parts:
        for start in settings:
            key = next(key for key in summary if key.startswith(start))
            measured.append(f"{summary[key][arm][of][reference]['median']:.2f}")
    (line,) = [
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row} |")
    ]
    assert re.findall(r"\d\.\d\d", line) == measured
