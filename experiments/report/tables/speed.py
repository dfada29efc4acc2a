"""Tables 3, 7 and 8: our steps/s and training memory from results/bench, next to three other numbers.

These are what the paper prints, what the authors' logs print, and what the logs show after correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from experiments.bench.lengths import histograms
from experiments.bench.presets import PADDED_TASK, PAPER_MODEL, paper_setting
from experiments.bench.results import ABOUT_MIXED, count_mixed, mark_mixed, repeat_ratios
from experiments.bench.settings import Setting, matches
from experiments.published import TASKS, authors_runs, cells, contradicts
from experiments.report.bench_files import documents
from experiments.report.tables.accuracy import AVERAGE, contradicted
from experiments.report.tables.base import MISSING, SCALED, Context, Table

Cells = Sequence[Mapping[str, Any]]
FIELDS = {"speed": "steps_per_second", "peak": "peak_mib"}  # name in a row of `measured` -> field of cells
PER_TASK = (7, 8)
# Padding of the benchmark -> name in columns. Padded dynamically, tasks differ in cost.
PADDINGS = {"max_length": "padded", "longest": "dynamic"}
# Row as printed -> our arm. The arms in `EXTRA` are not in the paper.
ARMS = {
    "Regular FT": "full",
    "LoRA": "lora_peft",
    "SparseGrad, Sparse-by-Dense": "layer_sparse_dense",
    "SparseGrad, Regular": "layer_regular",
}
SHORT = {"SparseGrad, Sparse-by-Dense": "SparseGrad SD", "SparseGrad, Regular": "SparseGrad Reg"}
EXTRA = {"exact": "SparseGrad, engine exact (ours)", "fast": "SparseGrad, engine fast, not exact (ours)"}
SKIPS_PADDING = "layer_sparse_dense"  # so its cost depends on the token lengths even when padded
LOGGED = {"full": "full", "lora_peft": "lora", "layer_regular": "sparsegrad"}
WHY = (
    "Why the logged numbers differ: logged steps/s divide the planned steps of 20 epochs by the time of a run that "
    "stopped early, and logged memory is that of the evaluation. The columns 'true' correct both; their time includes "
    "evaluation."
)
LOGGED_BATCH = "logs' batch"
BATCHES = (
    "The logs' batch sizes differ by method and task. Where a cell has two values, they are means over the runs of "
    "each batch size; compare values of the same batch size."
)
AVERAGES = (
    "Averages of steps/s are over the tasks that a method has at that batch size. These are not the same for all "
    "methods, and steps/s differ up to 2.8 times between tasks: compare methods task by task, as Table 7 does."
)


def measured(results: Path, shape: str = PAPER_MODEL) -> list[dict[str, Any]]:
    """One row per machine, setting and arm: medians over repeats, or None and a reason where all failed.

    `speed_mark` and `peak_mark` have what follows the ratio to another arm: empty if one commit measured both.
    """
    rows = []
    for name, document in documents(results):
        for key, setting in document["settings"].items():
            # As in the paper, the rest of the model trains too.
            if setting.get("shape") != shape or setting.get("rest") != "trained":
                continue
            of: dict[str, list[Mapping[str, Any]]] = {}
            for cell in document["cells"]:
                if cell["setting"] == key:
                    of.setdefault(cell["arm"], []).append(cell)
            rows += [_row(name, setting, arm, found, of) for arm, found in of.items()]
    return rows


def _row(name: str, setting: Mapping[str, Any], arm: str, found: Cells, of: Mapping[str, Cells]) -> dict[str, Any]:
    good = [cell for cell in found if cell["status"] == "complete"]
    about = {field: setting.get(field) or "" for field in ("label", *Setting.__dataclass_fields__)}
    medians = {name: median(cell[field] for cell in good) if good else None for name, field in FIELDS.items()}
    reason = "" if good else str(found[0].get("reason", ""))
    ratios: dict[str, dict[str, Any]] = {f"{name}_{what}": {} for name in FIELDS for what in ("over", "mark")}
    for kind, field in FIELDS.items():
        for other, theirs in of.items():
            if values := repeat_ratios(good, theirs, field):
                ratios[f"{kind}_over"][other] = median(values)
                ratios[f"{kind}_mark"][other] = mark_mixed(count_mixed(good, theirs, field), len(values))
    return {"machine": name, "arm": arm, **about, "n": len(good), **medians, **ratios, "reason": reason}


def tables(context: Context) -> list[Table]:
    """Tables 3, 7 and 8, and a table of all measured settings."""
    found = measured(context.results)
    return [_table3(found), _per_task(7, found), _per_task(8, found), _all_settings(found)]


def _table3(found: list[dict[str, Any]]) -> Table:
    rows = []
    for arm in (*ARMS.values(), *EXTRA):
        printed = {of: SHORT.get(name, name) for name, of in ARMS.items()}.get(arm)
        published = [cells(3)[printed, name][0] if printed else "none" for name in ("Steps/Sec.", "Memory MB")]
        logs = _logs(arm, None)
        others = dict(zip(("published steps/s", "published MB"), published, strict=True))
        others |= {LOGGED_BATCH: logs.pop(LOGGED_BATCH), **logs}
        rows.append({"arm": arm, **others, **_cells_of(found, arm, None, {"speed": "steps/s", "peak": "MiB"})})
    notes = [WHY, BATCHES, AVERAGES, _describe_source(found), _describe_extra()]
    notes += ["Published: the averages of Tables 7 and 8."]
    notes += [line for number in PER_TASK for line in contradicted(number)]
    return Table("table3", "Table 3: speed and memory, RoBERTa-base", pd.DataFrame(rows), notes)


def _per_task(number: int, found: list[dict[str, Any]]) -> Table:
    unit = {"speed": "steps/s"} if number == 7 else {"peak": "MiB"}
    ours = ("logged steps/s", "true steps/s") if number == 7 else ("logged MB", "true training MB")
    names = (LOGGED_BATCH, *ours)
    printed = {arm: row for row, arm in ARMS.items()}
    rows = []
    for arm in (*ARMS.values(), *EXTRA):
        for column, task in {**TASKS, "AVG": AVERAGE}.items():
            logs = _logs(arm, None if task == AVERAGE else task)
            published = cells(number)[printed[arm], column][0] if arm in printed else "none"
            published += contradicts(number, printed[arm]) if task == AVERAGE and arm in printed else ""
            others = {"published": published, **{name: logs[name] for name in names}}
            rows.append({"arm": arm, "task": task, **others, **_cells_of(found, arm, task, unit)})
    title = "steps per second" if number == 7 else "memory, MB"
    averages = [AVERAGES] if number == 7 else []
    notes = [WHY, BATCHES, *averages, _describe_source(found), _describe_extra(), *contradicted(number)]
    return Table(f"table{number}", f"Table {number}: {title} per task, RoBERTa-base", pd.DataFrame(rows), notes)


def _cells_of(found: list[dict[str, Any]], arm: str, task: str | None, units: Mapping[str, str]) -> dict[str, str]:
    """Our columns of a row, one per machine and padding; empty for an average.

    Padded to 128 tokens all tasks cost the same, except for the arm that skips the zero rows of padding.
    """
    paddings = ("max_length",) if task is None else tuple(PADDINGS)
    columns = {}
    for padding in paddings:
        own = task is not None and (padding == "longest" or arm == SKIPS_PADDING)
        for (machine, label), place in (_places(found, padding) or {("", ""): ""}).items():
            same = [row for row in found if (row["machine"], row["label"], row["arm"]) == (machine, label, arm)]
            hits = [row for row in same if _is_cell(row, padding, str(task) if own else PADDED_TASK)]
            for field, unit in units.items():
                text = "" if task == AVERAGE else _format_median(hits, field)
                columns[f"ours {PADDINGS[padding]}, {unit}{place and f', {place}'}"] = text
    return columns


def _places(found: list[dict[str, Any]], padding: str) -> dict[tuple[str, str], str]:
    """(machine, label) -> name of its column. Of a machine's models, the whole one is chosen if it has a cell."""
    places = {}
    for machine in dict.fromkeys(row["machine"] for row in found):
        rows = [row for row in found if row["machine"] == machine]
        shown = TASKS.values() if padding == "longest" else (PADDED_TASK,)
        labels = [row["label"] for row in rows if any(_is_cell(row, padding, task) for task in shown)]
        if labels:
            label = min(labels, key=lambda name: bool(_mark_scaled(name)))
            places[machine, label] = machine + _mark_scaled(label)
    return places


def _mark_scaled(label: str) -> str:
    return f" {SCALED}" if "scaled" in label else ""


def is_main(setting: Mapping[str, Any]) -> bool:
    """Whether a row of `measured`, or a setting of a benchmark file, has the setting of Table 3."""
    return _is_cell(setting, "max_length", PADDED_TASK)


def _is_cell(setting: Mapping[str, Any], padding: str, task: str) -> bool:
    """Whether a row has the setting of the paper for a task; the label says whether its model was cut.

    Other settings of the same model get here too, from `python -m experiments.bench --shape`.
    """
    return setting.get("task") == task and matches(setting, paper_setting(padding=padding), but=("task", "blocks"))


def _format_median(hits: list[dict[str, Any]], field: str) -> str:
    """The median over repeats, or the reason if all of them failed."""
    if not hits:
        return MISSING
    value = hits[0][field]
    return f"failed: {hits[0]['reason']}" if value is None else f"{value:.3g}" if field == "speed" else f"{value:.0f}"


def _describe_source(found: list[dict[str, Any]]) -> str:
    """A note on our measurements: machines, models and paddings."""
    if not any(map(is_main, found)):
        return "Ours: missing; `make reproduce-table3` measures them on this machine."
    padded, dynamic = (
        "; ".join(f"{machine}: {label}" for machine, label in _places(found, padding) if label) for padding in PADDINGS
    )
    without = ", ".join(task for task in TASKS.values() if task not in histograms())
    batch = paper_setting().batch
    return (
        f"Ours: batch size {batch}, float32, medians over repeats (counted in table3_measured). Padded to 128 tokens: "
        f"{padded or MISSING}; all tasks cost the same, except for {SKIPS_PADDING}, which skips padding and was "
        f"measured on CoLA. Padded dynamically to the longest row: {dynamic or MISSING}; token lengths are not "
        f"available for {without}. Scaled values are comparable only with each other."
    )


def _describe_extra() -> str:
    return "Arms that are not in the paper: " + "; ".join(f"{arm}: {about}" for arm, about in EXTRA.items()) + "."


def _logs(arm: str, task: str | None) -> dict[str, str]:
    """The authors' logs of an arm, as logged and corrected; means over seeds.

    Their batch sizes differ by method and task, so each batch size has its own mean over tasks.
    """
    columns = {
        "logged steps/s": ("logged_steps_per_second", 2),
        "true steps/s": ("true_steps_per_second", 2),
        "logged MB": ("eval_peak_mb", 0),
        "true training MB": ("train_peak_mb", 0),
    }
    if arm not in LOGGED:
        return dict.fromkeys([*columns, LOGGED_BATCH], "no log")
    tasks = [task] if task else list(TASKS.values())
    frame = pd.concat([authors_runs(PAPER_MODEL, LOGGED[arm], one) for one in tasks])
    sizes = sorted({int(size) for size in frame["batch_size"].dropna()})
    by_batch = {size: frame[frame["batch_size"] == size] for size in sizes}
    means = {
        name: " / ".join(_format_mean(rows[column], digits) for rows in by_batch.values())
        for name, (column, digits) in columns.items()
    }
    return {**means, LOGGED_BATCH: " / ".join(map(str, by_batch))}


def _format_mean(values: pd.Series[float], digits: int) -> str:
    given = values.dropna()
    return f"{mean(given):.{digits}f}" if len(given) else "no log"


def _all_settings(found: list[dict[str, Any]]) -> Table:
    rows = [_with_ratio(row) for row in found]
    names = ["machine", "model", "task", "padding", "batch", "precision", "mode", "arm", "steps/s", "of full"]
    names += ["peak MiB", "of full ", "n"]
    frame = pd.DataFrame(rows or [{**dict.fromkeys(names, ""), "machine": MISSING}], columns=names)
    notes = [
        "One process per arm and repeat, with alternating arms. Values are medians over repeats; ratios are taken "
        "within a repeat.",
        "Peak: allocated memory on a GPU, resident memory above the loaded model on a CPU.",
        "Models have random weights and the real architecture, cut to fewer blocks where the label says so; batches "
        "have real token lengths.",
        _describe_extra(),
    ]
    notes += [ABOUT_MIXED] if any(row[f"{kind}_mark"].get("full") for row in found for kind in FIELDS) else []
    if not rows:
        notes.append(
            "Missing: measure them with `make reproduce-table3` (python -m experiments.bench --presets paper)."
        )
    return Table("table3_measured", "Tables 3, 7 and 8: measured here", frame, notes)


def _with_ratio(row: Mapping[str, Any]) -> dict[str, str]:
    ratios = {
        name: f"{row[f'{kind}_over']['full']:.2f}{row[f'{kind}_mark']['full']}" if "full" in row[f"{kind}_over"] else ""
        for name, kind in (("of full", "speed"), ("of full ", "peak"))
    }
    about = {name: str(row[name]) for name in ("machine", "task", "padding", "batch", "precision", "mode", "arm", "n")}
    failed = row["speed"] is None
    values = {"steps/s": f"failed: {row['reason']}" if failed else f"{row['speed']:.3f}"}
    values["peak MiB"] = "" if failed else f"{row['peak']:.0f}"
    return {"model": _describe_model(row), **about, **values, **ratios}


def _describe_model(row: Mapping[str, Any]) -> str:
    """The label of a row, with density and length where they are not those of the paper's settings."""
    usual = paper_setting().as_json()
    unusual = [f"{field} {row[field]}" for field in ("density", "length") if row[field] != usual[field]]
    return ", ".join([str(row["label"] or PAPER_MODEL), *unusual])
