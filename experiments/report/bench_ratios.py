"""Ratios of two arms of the benchmark within a repeat, in the setting of Table 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.results import complete, repeat_ratios
from experiments.report.tables.speed import documents, is_main

MIN_REPEATS = 3
ON_CPU = "a CPU"
CUT = "model cut to fewer blocks"
Ratios = dict[tuple[bool, int], list[float]]
"""(whether the model is whole, its number of blocks) -> ratio in each repeat; the largest key is the best evidence."""


def machine_ratios(results: Path, arm: str, over: str, field: str) -> dict[str, list[float]]:
    """Description of a machine -> ratio of two arms within each repeat, in the setting of Table 3.

    Machines with a GPU, if any was measured. Of a machine's models with enough repeats, that with the most blocks
    counts; the ratio of a larger one with fewer repeats is in the description.
    """
    found: dict[str, Ratios] = {}
    few: dict[str, Ratios] = {}
    is_gpu = {}
    for name, document in documents(results):
        is_gpu[name] = document.get("hardware", {}).get("device", "cpu") != "cpu"
        for key, setting in document["settings"].items():
            if is_main(setting):
                ratios = repeat_ratios(complete(document, key, arm), complete(document, key, over), field)
                if ratios:
                    enough = found if len(ratios) >= MIN_REPEATS else few
                    enough.setdefault(name, {})[_rank_model(setting)] = ratios
    chosen = [name for name in sorted(found) if is_gpu[name]] or sorted(found)
    shown = {}
    for name in chosen:
        best = max(found[name])
        about = _describe(name, found[name], is_gpu[name]) + _describe_larger(best, few.get(name, {}))
        shown[about] = found[name][best]
    return shown


def _rank_model(setting: Mapping[str, Any]) -> tuple[bool, int]:
    return "scaled" not in (setting.get("label") or ""), setting.get("blocks") or 0


def _describe_larger(decides: tuple[bool, int], few: Ratios) -> str:
    """The ratio of the largest model with too few repeats, if it is larger than the one that decides."""
    best = max(few, default=decides)
    if best <= decides:
        return ""
    model = "the whole model" if best[0] else f"{best[1]} blocks"
    return f"; {model}: {median(few[best]):.2f} in {len(few[best])} repeat{'s' * (len(few[best]) > 1)}"


def _describe(name: str, models: Mapping[tuple[bool, int], Sequence[float]], is_gpu: bool) -> str:
    best = max(models)
    scaled = "" if best[0] else f", {CUT}"
    return f"{name}, {'a GPU' if is_gpu else ON_CPU}{scaled}, {len(models[best])} repeats"
