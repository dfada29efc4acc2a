"""Speed and memory of each arm on MiniLM, from the benchmark: accuracy runs share their machine with other work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.presets import ACCURACY_SETTING
from experiments.bench.settings import matches
from experiments.report.bench_files import documents


@dataclass(frozen=True)
class Cost:
    """Median steps/s and peak memory of one arm."""

    speed: float
    peak_mib: float


def measured(results: Path) -> tuple[str, dict[str, Cost]]:
    """(machine with the most arms in the benchmark's MiniLM setting, arm -> its cost there).

    The setting is that of the benchmark's plan; others of the same model, measured on their own, do not count.
    """
    found: dict[str, dict[str, Cost]] = {}
    for name, document in documents(results):
        for key, setting in document["settings"].items():
            if matches(setting, ACCURACY_SETTING):
                where = f"{name}, batch {setting['batch']}, {setting['precision']}"
                found[where] = _costs(document, key)
    best = max(found, key=lambda where: len(found[where]), default="")
    return best, found.get(best, {})


def _costs(document: Mapping[str, Any], setting: str) -> dict[str, Cost]:
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for cell in document["cells"]:
        if cell["setting"] == setting and cell["status"] == "complete":
            by_arm.setdefault(cell["arm"], []).append(cell)
    return {
        arm: Cost(*(median(cell[field] for cell in cells) for field in ("steps_per_second", "peak_mib")))
        for arm, cells in by_arm.items()
    }
