"""Ratios of two arms of the benchmark within a repeat, in the setting of Table 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.results import complete, count_mixed, repeat_ratios
from experiments.report.bench_files import documents
from experiments.report.tables.speed import is_main

MIN_REPEATS = 3
ON_CPU = "a CPU"
CUT = "model cut to fewer blocks"
Ratios = dict[tuple[bool, int], list[float]]
"""(whether the model is whole, its number of blocks) -> ratio in each repeat; the largest key is the best evidence."""


def machine_ratios(results: Path, arm: str, over: str, field: str) -> dict[str, list[float]]:
    """Description of a machine -> ratio of two arms within each repeat, in the setting of Table 3.

    Machines with a GPU, if any was measured. Of a machine's models with enough repeats, that with the most blocks
    counts; the ratio of a larger one with fewer repeats is in the description, and in how many repeats different
    commits measured the two arms.
    """
    found: dict[str, Ratios] = {}
    few: dict[str, Ratios] = {}
    mixed: dict[str, dict[tuple[bool, int], int]] = {}
    is_gpu = {}
    for name, document in documents(results):
        is_gpu[name] = document.get("hardware", {}).get("device", "cpu") != "cpu"
        for key, setting in document["settings"].items():
            if is_main(setting):
                cells, others = list(complete(document, key, arm)), list(complete(document, key, over))
                if ratios := repeat_ratios(cells, others, field):
                    mixed.setdefault(name, {})[_rank_model(setting)] = count_mixed(cells, others, field)
                    enough = found if len(ratios) >= MIN_REPEATS else few
                    enough.setdefault(name, {})[_rank_model(setting)] = ratios
    chosen = [name for name in sorted(found) if is_gpu[name]] or sorted(found)
    shown = {}
    for name in chosen:
        best = max(found[name])
        about = _describe(name, found[name], is_gpu[name]) + _describe_mixed(mixed[name][best], len(found[name][best]))
        about += _describe_larger(best, few.get(name, {}), mixed[name])
        shown[about] = found[name][best]
    return shown


def _rank_model(setting: Mapping[str, Any]) -> tuple[bool, int]:
    return "scaled" not in (setting.get("label") or ""), setting.get("blocks") or 0


def _describe_larger(decides: tuple[bool, int], few: Ratios, mixed: Mapping[tuple[bool, int], int]) -> str:
    """The ratio of the largest model with too few repeats, if it is larger than the one that decides."""
    best = max(few, default=decides)
    if best <= decides:
        return ""
    model = "the whole model" if best[0] else f"{best[1]} blocks"
    count = len(few[best])
    repeats = f"{count} repeat{'s' * (count > 1)}{_describe_mixed(mixed[best], count)}"
    return f"; {model}: {median(few[best]):.2f} in {repeats}"


def _describe_mixed(mixed: int, repeats: int) -> str:
    """That different commits measured the two arms, in separate calls, so that drift of the machine does not cancel."""
    part = "" if mixed == repeats else f" in {mixed} of them"
    return f", the two methods by different commits{part}" if mixed else ""


def _describe(name: str, models: Mapping[tuple[bool, int], Sequence[float]], is_gpu: bool) -> str:
    best = max(models)
    scaled = "" if best[0] else f", {CUT}"
    return f"{name}, {'a GPU' if is_gpu else ON_CPU}{scaled}, {len(models[best])} repeats"
