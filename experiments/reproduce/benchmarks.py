"""Tables 3, 7, 8 and section 8: list and make the benchmark measurements that this machine lacks.

The results are stored in results/bench/HARDWARE.json. Complete measurements are not repeated; failed ones are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench import machine
from experiments.bench.arms import arms_of
from experiments.bench.presets import decompositions, default_schedule, plan
from experiments.bench.results import find_cell, read
from experiments.paths import ROOT
from experiments.reproduce.dry_run import format_left, print_listing
from sparsegrad.device import pick_device
from sparsegrad.files import write_json

PRESETS = {
    "table3": ("paper",),
    "table7": ("paper",),
    "table8": ("paper",),
    "section8": ("decomposition",),
    "all": ("paper", "decomposition"),
}
MINUTES = 600  # time limit of one call; the benchmark's default on a CPU is meant for a quick look at all presets
START_SECONDS = 10  # from the start of a process to its first step; for estimates


@dataclass(frozen=True)
class Measurement:
    """One measurement of the benchmark, and its result so far (None: not measured)."""

    setting: str
    arm: str
    found: dict[str, Any] | None

    @property
    def is_complete(self) -> bool:
        """Whether the measurement succeeded."""
        return self.found is not None and self.found["status"] == "complete"


def make(preset: str, results: Path, *, dry: bool) -> int:
    """Make the missing measurements of a preset, or list them if `dry`; status 1 if some are left or failed."""
    path = _path(results)
    if dry:
        _show(preset, path, _planned(preset, read(path)))
        return 0
    _forget_failures(preset, path)
    if not all(one.is_complete for one in _planned(preset, read(path))):
        call(preset, path)
    left = [one for one in _planned(preset, read(path)) if not one.is_complete]
    for one in left:
        reason = "not measured yet" if one.found is None else one.found["reason"]
        print(f"failed: {one.setting} {one.arm}: {reason}; the next call tries it again")
    return 1 if left else 0


def call(preset: str, path: Path) -> None:
    """Run the benchmark in a process of its own."""
    command = [sys.executable, "-m", "experiments.bench", "--presets", preset]
    known = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = ["--out", str(path), "--minutes", str(MINUTES)]
    subprocess.run([*command, *options], check=False, env={**os.environ, "PYTHONPATH": known})


def _path(results: Path) -> Path:
    slug = machine.slug(pick_device("auto"), machine.default_threads())
    return results / "bench" / f"{slug}.json"


def _planned(preset: str, document: dict[str, Any]) -> list[Measurement]:
    if preset == "decomposition":
        keys = [one.key for one in decompositions(quick=False)]
        return [Measurement("decomposition", key, document["decompositions"].get(key)) for key in keys]
    return list(_cells(preset, document))


def _cells(preset: str, document: dict[str, Any]) -> Iterator[Measurement]:
    device = pick_device("auto")
    repeats = default_schedule(device, quick=False).repeats
    for planned in (one for one in plan(device, quick=False) if one.preset == preset):
        key = planned.setting.key
        for arm in arms_of(planned.setting, planned.arms):
            yield from (Measurement(key, arm, find_cell(document, key, arm, repeat)) for repeat in range(repeats))


def _forget_failures(preset: str, path: Path) -> None:
    """Remove failed measurements: each table repeats even those that ran out of GPU memory."""
    if not path.exists():
        return
    document = read(path)
    failed = [one.found for one in _planned(preset, document) if one.found is not None and not one.is_complete]
    if failed:
        found = document["decompositions"].items()
        document["decompositions"] = {key: one for key, one in found if one not in failed}
        document["cells"] = [cell for cell in document["cells"] if cell not in failed]
        write_json(path, document)


def _show(preset: str, path: Path, planned: list[Measurement]) -> None:
    cells = read(path)["cells"]
    rows, total, unknown = [], 0.0, 0
    short = _shorten_settings([one.setting for one in planned])
    for setting, arm in dict.fromkeys((one.setting, one.arm) for one in planned):
        group = [one for one in planned if (one.setting, one.arm) == (setting, arm)]
        complete, absent = sum(one.is_complete for one in group), sum(one.found is None for one in group)
        left, each = len(group) - complete, _seconds(cells, arm)
        total, unknown = total + left * (each or 0.0) / 60, unknown + (left if each is None else 0)
        counts = {"complete": str(complete), "failed": str(left - absent), "missing": str(absent)}
        minutes = format_left(left, None if each is None else each / 60, digits=1)
        rows.append({"setting": short[setting], "arm": arm, **counts, "minutes left": minutes})
    done = sum(one.is_complete for one in planned)
    cost = f", and {unknown} measurements of unknown cost: none was made on this machine yet" if unknown else ""
    print_listing(
        f"{preset}: {done} of {len(planned)} measurements complete; about {total:.0f} minutes left{cost}\n{path}", rows
    )


def _shorten_settings(keys: Iterable[str]) -> dict[str, str]:
    """Key of a setting -> those of its parts that not all settings have; the hash at its end only where needed."""
    distinct = list(dict.fromkeys(keys))
    for last in (-1, None):
        parts = [key.split("-")[:last] for key in distinct]
        common = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
        short = ["-".join(part for part in one if part not in common) for one in parts]
        if len(set(short)) == len(distinct) and all(short):
            return dict(zip(distinct, short, strict=True))
    return {key: key for key in distinct}


def _seconds(cells: list[dict[str, Any]], arm: str) -> float | None:
    """Median seconds of a measurement of this arm on this machine, or of any arm; None without measurements."""
    complete = [cell for cell in cells if cell["status"] == "complete"]
    like = [cell for cell in complete if cell["arm"] == arm] or complete
    spent = [(cell["warmup_steps"] + cell["steps"]) / cell["steps_per_second"] for cell in like]
    return START_SECONDS + median(spent) if spent else None
