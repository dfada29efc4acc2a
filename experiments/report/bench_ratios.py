"""Ratios of two arms of the benchmark within a repeat, in the setting of Table 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.results import complete, repeat_ratios
from experiments.report.tables.speed import documents, is_main

MIN_REPEATS = 3
ON_CPU = "a CPU"
Ratios = dict[tuple[bool, int], list[float]]
"""(whether the model is whole, its number of blocks) -> ratio in each repeat; the largest key is the best evidence."""


def machine_ratios(results: Path, arm: str, over: str, field: str) -> dict[str, list[float]]:
    """Description of a machine -> ratio of two arms within each repeat, in the setting of Table 3.

    Machines with a GPU, if any was measured. Of a machine's models with enough repeats, that with the most blocks
    counts.
    """
    found: dict[str, Ratios] = {}
    is_gpu = {}
    for name, document in documents(results):
        is_gpu[name] = document.get("hardware", {}).get("device", "cpu") != "cpu"
        for key, setting in document["settings"].items():
            if is_main(setting):
                ratios = repeat_ratios(complete(document, key, arm), complete(document, key, over), field)
                if len(ratios) >= MIN_REPEATS:
                    found.setdefault(name, {})[_rank_model(setting)] = ratios
    chosen = [name for name in sorted(found) if is_gpu[name]] or sorted(found)
    return {_describe(name, found[name], is_gpu[name]): found[name][max(found[name])] for name in chosen}


def _rank_model(setting: Mapping[str, Any]) -> tuple[bool, int]:
    return "scaled" not in (setting.get("label") or ""), setting.get("blocks") or 0


def _describe(name: str, models: Mapping[tuple[bool, int], Sequence[float]], is_gpu: bool) -> str:
    best = max(models)
    scaled = "" if best[0] else ", model cut to fewer blocks"
    return f"{name}, {'a GPU' if is_gpu else ON_CPU}{scaled}, {len(models[best])} repeats"
