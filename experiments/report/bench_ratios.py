"""Ratios of two arms of the benchmark within a repeat, in which both see the same load of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.report.tables.speed import MODEL, Cells, documents, is_main

MIN_REPEATS = 3
ON_CPU = "a CPU"


def repeat_ratios(results: Path, arm: str, over: str, field: str) -> dict[str, list[float]]:
    """Description of a machine -> ratio of two arms within each repeat, in the setting of Table 3.

    Machines with a GPU, if any was measured. Of a machine's models the whole one counts, if it has enough repeats.
    """
    found: dict[str, dict[bool, list[float]]] = {}
    is_gpu = {}
    for name, document in documents(results):
        is_gpu[name] = document.get("hardware", {}).get("device", "cpu") != "cpu"
        for key, setting in document["settings"].items():
            row = {"batch": None, "padding": None, "precision": None, "mode": None, **setting}
            if setting.get("shape") == MODEL and setting.get("rest") == "trained" and is_main(row):
                ratios = _ratios_within(document["cells"], key, arm, over, field)
                if len(ratios) >= MIN_REPEATS:
                    found.setdefault(name, {})["scaled" in (setting.get("label") or "")] = ratios
    chosen = [name for name in sorted(found) if is_gpu[name]] or sorted(found)
    return {_describe(name, found[name], is_gpu[name]): found[name][min(found[name])] for name in chosen}


def _describe(name: str, models: Mapping[bool, Sequence[float]], is_gpu: bool) -> str:
    scaled = ", model cut to fewer blocks" if min(models) else ""
    return f"{name}, {'a GPU' if is_gpu else ON_CPU}{scaled}, {len(models[min(models)])} repeats"


def _ratios_within(cells: Cells, setting: str, arm: str, over: str, field: str) -> list[float]:
    """The ratio in each repeat that has both arms."""
    good = [cell for cell in cells if cell["setting"] == setting and cell["status"] == "complete"]
    others = {cell["repeat"]: cell[field] for cell in good if cell["arm"] == over and cell[field]}
    return [cell[field] / others[cell["repeat"]] for cell in good if cell["arm"] == arm and cell["repeat"] in others]
