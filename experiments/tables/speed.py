"""Tables 3, 7 and 8: steps/s and training memory, from results/bench; beside them three figures of others.

What the paper prints, what the authors' logs printed, and what their logs say when read rightly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from experiments.published import TASKS, authors_runs, cells
from experiments.tables.base import MISSING, Context, Table

MODEL = "roberta_base"
# Row as printed -> our arm; the merged engine and the block engine are ours alone.
ARMS = {
    "Regular FT": "full",
    "LoRA": "lora_peft",
    "SparseGrad, Sparse-by-Dense": "layer_sparse_dense",
    "SparseGrad, Regular": "layer_regular",
}
SHORT = {"SparseGrad, Sparse-by-Dense": "SparseGrad SD", "SparseGrad, Regular": "SparseGrad Reg"}
EXTRA = {"merged": "SparseGrad, merged engine (ours)", "fast": "SparseGrad fast, not exact (ours)"}
LOGGED = {"full": "full", "lora_peft": "lora", "layer_regular": "sparsegrad"}
WHY = (
    "Why the others differ: the logged steps/s divide the planned steps of 20 epochs by the time of a run that stopped "
    "early, and the logged memory is the evaluation's; the columns 'true' undo both (evaluation still inside the time)."
)


def documents(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of each benchmark file; unreadable ones and those of another schema are left out."""
    for path in sorted((results / "bench").glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("schema") == 1 and "cells" in found and "settings" in found:
            yield path.stem, found


def measured(results: Path, shape: str = MODEL) -> list[dict[str, Any]]:
    """One row per hardware, setting and arm: medians over repeats."""
    rows = []
    for name, document in documents(results):
        for key, setting in document["settings"].items():
            if setting.get("shape") != shape or setting.get("rest") != "trained":
                continue
            of: dict[str, list[Mapping[str, Any]]] = {}
            for cell in document["cells"]:
                if cell["setting"] == key and cell["status"] == "complete":
                    of.setdefault(cell["arm"], []).append(cell)
            rows += [_row(name, setting, arm, found) for arm, found in of.items()]
    return rows


def _row(name: str, setting: Mapping[str, Any], arm: str, found: list[Mapping[str, Any]]) -> dict[str, Any]:
    what = ("label", "task", "padding", "batch", "precision", "mode")
    speeds, peaks = ([cell[field] for cell in found] for field in ("steps_per_second", "peak_mib"))
    about = {field: setting.get(field) or "" for field in what}
    return {"machine": name, "arm": arm, **about, "n": len(found), "speed": median(speeds), "peak": median(peaks)}


def tables(context: Context) -> list[Table]:
    """Tables 3, 7 and 8, and what was measured in every setting."""
    return [_table3(), _per_task(7), _per_task(8), _ours(context)]


def _table3() -> Table:
    rows = []
    for printed, arm in ARMS.items():
        row = SHORT.get(printed, printed)
        speed, memory = (cells(3)[row, column][0] for column in ("Steps/Sec.", "Memory MB"))
        rows.append({"arm": arm, "published steps/s": speed, "published MB": memory, **_logs(arm, None)})
    notes = [WHY, "Ours: the table of what was measured here."]
    return Table("table3", "Table 3: speed and memory, RoBERTa-base", pd.DataFrame(rows), notes)


def _per_task(number: int) -> Table:
    speed = number == 7
    rows = []
    for printed, arm in ARMS.items():
        for column, task in TASKS.items():
            names = ("logged steps/s", "true steps/s") if speed else ("logged MB", "true training MB")
            others = {name: value for name, value in _logs(arm, task).items() if name in names}
            published = cells(number)[printed, column][0]
            rows.append({"arm": arm, "task": task, "published": published, **others})
    title = "steps per second" if speed else "memory, MB"
    return Table(f"table{number}", f"Table {number}: {title} per task, RoBERTa-base", pd.DataFrame(rows), [WHY])


def _logs(arm: str, task: str | None) -> dict[str, str]:
    """The authors' logs of an arm: as printed by them, and the true values; means over tasks and seeds."""
    columns = {
        "logged steps/s": ("logged_steps_per_second", 2),
        "true steps/s": ("true_steps_per_second", 2),
        "logged MB": ("eval_peak_mb", 0),
        "true training MB": ("train_peak_mb", 0),
    }
    if arm not in LOGGED:
        return dict.fromkeys(columns, "no log")
    tasks = [task] if task else list(TASKS.values())
    frame = pd.concat([authors_runs(MODEL, LOGGED[arm], one) for one in tasks])
    found = {name: frame[column].dropna() for name, (column, _) in columns.items()}
    return {name: f"{mean(values):.{columns[name][1]}f}" if len(values) else "no log" for name, values in found.items()}


def _ours(context: Context) -> Table:
    found = measured(context.results)
    rows = [_with_ratio(row, found) for row in found]
    names = [
        "machine",
        "model",
        "task",
        "padding",
        "batch",
        "precision",
        "arm",
        "steps/s",
        "of full",
        "peak MiB",
        "of full ",
    ]
    frame = pd.DataFrame(rows or [{**dict.fromkeys(names, ""), "machine": MISSING}], columns=names)
    notes = [
        "One process per arm and repeat, in turn, medians; peak: GPU allocated, CPU resident above the loaded model.",
        "Random weights of the true architecture (or cut to the blocks that the label names), real token lengths.",
        "Arms that the paper has not: " + "; ".join(f"{arm}: {about}" for arm, about in EXTRA.items()) + ".",
    ]
    if not rows:
        notes.append("Missing: python -m sparsegrad.benchmark --preset paper, on this hardware.")
    return Table("table3_measured", "Tables 3, 7 and 8: measured here", frame, notes)


def _with_ratio(row: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, str]:
    same = ("machine", "label", "task", "padding", "batch", "precision", "mode")
    full = [one for one in found if one["arm"] == "full" and all(one[name] == row[name] for name in same)]
    ratios = {
        name: f"{row[field] / full[0][field]:.2f}" if full and full[0][field] > 0 else ""
        for name, field in (("of full", "speed"), ("of full ", "peak"))
    }
    shown = {name: str(row[name]) for name in ("machine", "task", "padding", "batch", "precision", "arm")}
    values = {"steps/s": f"{row['speed']:.3f}", "peak MiB": f"{row['peak']:.0f}"}
    return {"model": str(row["label"] or MODEL), **shown, **values, **ratios}
