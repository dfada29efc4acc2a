"""Quality and cost: the engines compared with LoRA and MeProp at the same trainable count, on MiniLM and four tasks.

Scores and losses come from the mini runs. Steps/s and memory come from the benchmark, because accuracy runs share their
machine with other work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from experiments.report.stats import Summary, summarise, welch_interval
from experiments.report.tables.accuracy import (
    AVERAGE,
    COLLAPSED,
    MINI_RUNS,
    MINI_TASKS,
    SCORES,
    SEEDS,
    UNCORRECTED,
    Grid,
)
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table, caveat, interval_text
from experiments.report.tables.speed import documents, paired_ratio

EXACT, LORA, TUNED = "sparsegrad", "lora", "lora_tuned"
LORA_ARM = "lora_peft"
# Method of the accuracy runs -> (name in the table, arm of the benchmark).
ARMS = {
    "full": ("full fine-tuning", "full"),
    EXACT: ("SparseGrad, engine exact (default)", "exact"),
    "sparsegrad_fast": ("SparseGrad, engine fast (not exact)", "fast"),
    "sparsegrad_authors": ("SparseGrad as in the authors' code", "authors"),
    LORA: ("LoRA, alpha = 1", LORA_ARM),
    TUNED: ("LoRA, alpha = 2 rank", LORA_ARM),
    "meprop": ("MeProp", "meprop"),
}
REFERENCES = {LORA: "minus LoRA", TUNED: "minus LoRA, alpha = 2 rank", EXACT: "minus exact"}
# Names of the arms in energy.json -> names here.
CAPTURED = {
    "exact, both sides": "exact",
    "small side": "exact, small side only",
    "block, proportional": "fast, block proportional to the weight",
    "block, inputs alone": "fast, block over the inputs alone",
}
SETTING = {"shape": "minilm", "padding": "longest", "task": "snippets", "rest": "trained", "mode": "eager"}


@dataclass(frozen=True)
class Cost:
    """Median steps/s and peak memory of one arm, and the medians of their ratios to `LORA_ARM`."""

    speed: float
    peak_mib: float
    speed_ratio: float | None
    peak_ratio: float | None


def table(context: Context) -> Table:
    """One row per method: scores, differences from LoRA and exact, training loss, steps/s, memory."""
    grid, (machine, costs) = _grid(context), measured(context.results)
    rows = [_row(context, grid, method, costs) for method in ARMS]
    notes = [
        SCORES + " n: seeds with all tasks.",
        COLLAPSED,
        MINI_RUNS,
        f"Differences of the average: two-sided 95 % Welch intervals ({SEEDS} seeds); if an interval contains 0, the "
        "difference is not significant. " + UNCORRECTED,
        "The default engine takes the same steps as the paper's layer, which a test checks.",
        caveat(context.results),
        "Checkpoints are chosen on held-out training rows.",
        "Loss: training loss averaged over the steps that all runs of a task have, then over the tasks; cross-entropy, "
        "or the squared error for STS-B. The loss of the authors' code is not comparable: its calibration trains the "
        "model for 11 steps that the curve does not include.",
        f"steps/s and peak: {_describe_source(machine)}; medians, with ratios to LoRA within a repeat. Both LoRA rows "
        "have the same arm there.",
    ]
    return Table(
        "quality", f"Quality and cost ({MINI_MARK})", pd.DataFrame(rows), notes, dict(grid.records(list(ARMS)))
    )


def per_task(context: Context) -> Table:
    """One row per method and task."""
    grid = _grid(context)
    rows = [
        {
            "method": name,
            "task": task,
            **_score(grid, method, task),
            "loss": _format_mean(losses(context, method, task), 4),
        }
        for method, (name, _) in ARMS.items()
        for task in MINI_TASKS
    ]
    notes = [
        SCORES,
        COLLAPSED,
        "Differences: two-sided 95 % Welch intervals. " + UNCORRECTED,
        "Loss: over the steps that all runs have; not comparable for the authors' code (see the table above).",
    ]
    return Table("quality_per_task", f"Quality per task ({MINI_MARK})", pd.DataFrame(rows), notes)


def energy(context: Context) -> Table:
    """Share of the gradient that each engine captures, by layer kind, at the first and last measured step."""
    path = context.results / "figures" / "energy.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    steps = sorted({row["step"] for row in rows})
    lines = [_shares(rows, arm, steps) for arm in dict.fromkeys(row["arm"] for row in rows)]
    notes = [
        "Share of the squared norm of an MLP weight's gradient in the 1 % of entries that an engine trains (the "
        "largest 1 % after rotation, or a leading block), averaged over blocks. `all`: mean over the measured steps.",
        "A larger share does not imply better training: see the quality table.",
    ]
    if not rows:
        notes, lines = (
            [f"{MISSING}: measure it with `python -m experiments.studies.gradients energy`"],
            [{"arm": MISSING}],
        )
    return Table("quality_energy", f"Gradient captured by each engine ({MINI_MARK})", pd.DataFrame(lines), notes)


def _shares(rows: Sequence[Mapping[str, Any]], arm: str, steps: Sequence[int]) -> dict[str, str]:
    of = {(row["kind"], row["step"]): mean(row["blocks"]) for row in rows if row["arm"] == arm}
    line = {"arm": CAPTURED.get(arm, arm)}
    for kind in dict.fromkeys(kind for kind, _ in of):
        line |= {f"{kind}, step {step}": f"{of[kind, step]:.3f}" for step in dict.fromkeys((steps[0], steps[-1]))}
        line[f"{kind}, all"] = f"{mean(of[kind, step] for step in steps):.3f}"
    return line


def _grid(context: Context) -> Grid:
    return Grid(context, "mini", "minilm", "heldout", MINI_TASKS)


def _row(context: Context, grid: Grid, method: str, costs: Mapping[str, Cost]) -> dict[str, str]:
    name, arm = ARMS[method]
    scores = {task: grid.line(method, task)["ours"] for task in MINI_TASKS}
    average = _score(grid, method, AVERAGE)
    of_tasks = [losses(context, method, task) for task in MINI_TASKS]
    loss = summarise([one.mean for one in of_tasks if one]) if all(of_tasks) else None
    cost = costs.get(arm)
    return {
        "method": name,
        **scores,
        AVERAGE: average.pop("score"),
        **average,
        "loss": _format_mean(loss, 4),
        "trainable": _trainable(context, grid, method),
        "steps/s": _format_number(cost.speed if cost else None, 2),
        "over LoRA": _format_number(cost.speed_ratio if cost else None, 2),
        "peak MiB": _format_number(cost.peak_mib if cost else None, 0),
        "over LoRA ": _format_number(cost.peak_ratio if cost else None, 2),
    }


def _score(grid: Grid, method: str, task: str) -> dict[str, str]:
    """Score, number of seeds, and the interval of the difference from each reference."""
    line, values = grid.line(method, task), grid.values(method, task)
    intervals = {
        heading: interval_text(welch_interval(values, grid.values(reference, task)) if method != reference else None)
        for reference, heading in REFERENCES.items()
    }
    return {"score": line["ours"], "n": line["n"], **intervals}


def losses(context: Context, method: str, task: str) -> Summary | None:
    """Training loss over seeds, each averaged over the steps that all runs of the task have, of any method."""
    # A method with longer runs would otherwise have a lower mean loss.
    last = min((rows[-1]["step"] for one in ARMS for rows in _curves(context, one, task)), default=None)
    if last is None:
        return None
    return summarise(
        [mean(row["loss"] for row in rows if row["step"] <= last) for rows in _curves(context, method, task)]
    )


def _curves(context: Context, method: str, task: str) -> Iterator[Sequence[Mapping[str, Any]]]:
    """The logged training losses of each complete run of a cell."""
    for run in context.store.runs.get(_grid(context).key(method, task), []):
        rows = context.store.records[run.path].get("losses", [])
        if run.value is not None and rows:
            yield rows


def measured(results: Path) -> tuple[str, dict[str, Cost]]:
    """(machine with the most arms in the benchmark's MiniLM setting, arm -> its cost there)."""
    found: dict[str, dict[str, Cost]] = {}
    for name, document in documents(results):
        for key, setting in document["settings"].items():
            if all(setting.get(field) == value for field, value in SETTING.items()):
                where = f"{name}, batch {setting.get('batch')}, {setting.get('precision')}"
                found[where] = _costs(document, key)
    best = max(found, key=lambda where: len(found[where]), default="")
    return best, found.get(best, {})


def _costs(document: Mapping[str, Any], setting: str) -> dict[str, Cost]:
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for cell in document["cells"]:
        if cell["setting"] == setting and cell["status"] == "complete":
            by_arm.setdefault(cell["arm"], []).append(cell)
    fields, rival = ("steps_per_second", "peak_mib"), by_arm.get(LORA_ARM, [])
    return {
        arm: Cost(
            *(median(cell[field] for cell in cells) for field in fields),
            *(paired_ratio(cells, rival, field) for field in fields),
        )
        for arm, cells in by_arm.items()
    }


def points(context: Context) -> list[dict[str, Any]]:
    """The points of the plot: methods with an average score and a measured speed; `front`: on the Pareto front."""
    grid, (_, costs) = _grid(context), measured(context.results)
    found = []
    for method, (name, arm) in ARMS.items():
        score, cost = summarise(grid.values(method, AVERAGE)), costs.get(arm)
        if score is not None and cost is not None:
            about = {"method": method, "name": name, "n": score.n, "std": score.std}
            found.append({**about, "score": round(score.mean, 4), "steps_per_second": cost.speed})
    return [{**one, "front": not any(_beats(other, one) for other in found)} for one in found]


def _beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether `a` is at least as good and as fast as `b`, and better in one of the two."""
    pairs = [(a[axis], b[axis]) for axis in ("score", "steps_per_second")]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def _trainable(context: Context, grid: Grid, method: str) -> str:
    """Trainable entries of the MLP weights of one block; missing without a run."""
    for task in MINI_TASKS:
        for run in context.store.runs.get(grid.key(method, task), []):
            per_weight = context.store.records[run.path].get("trainable", {}).get("per_weight")
            if per_weight:
                return f"{sum(per_weight.values()):,}"
    return MISSING


def _describe_source(machine: str) -> str:
    if not machine:
        return f"{MISSING}; measure them with `python -m experiments.bench --presets model`"
    return f"results/bench/{machine}, MiniLM on snippets padded to the longest row, random weights"


def _format_mean(found: Summary | None, digits: int) -> str:
    return _format_number(found.mean if found else None, digits)


def _format_number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
