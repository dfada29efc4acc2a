"""The table and the figure of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from experiments.compare.block import load_comparison
from experiments.compare.figure import draw
from experiments.compare.forgetting import read_forgetting
from experiments.palette import style_of
from experiments.report.collect import collect_cells
from experiments.report.evidence import Block, Evidence, EvidenceRun
from experiments.report.gates import Health, check_task
from experiments.report.render import markdown, write_table
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.searches import Searches
from experiments.report.stats import Difference, holm
from experiments.report.tables.base import Context, Table, interval_text
from experiments.report.tables.evidence_cells import format_averages, format_costs, format_difference, format_score

NOTES = (
    "Sorted by the average over comparable tasks. Scores in points: mean ± sample std over seeds (number of seeds); "
    "the checkpoint is chosen on held-out training rows. The interval of the average is that of docs/evidence.md.",
    "Difference from the reference, paired by seed and row; p adjusted by Holm over this table. Detectable: the "
    "smallest true difference that this comparison finds in 80 % of repetitions.",
    "Each search has the same number of trials of the learning rate. Trainable: of the entries of the MLP weights, "
    "without the head.",
    "steps/s and peak MiB: medians over the runs, which shared their machine; the benchmark (docs/performance.md) has "
    "undisturbed ones. h to target: until full fine-tuning's held-out score minus one point is first reached.",
)


def write_comparison(results: Path, folder: str) -> str:
    """Write table and figure to `<results>/compare`; the table as Markdown.

    Raises:
        UserError: for a damaged record or plan, or a folder that cannot be written.
    """
    context = Context(results, collect_cells(results / "runs"), "mini")
    table, rows = make_table(context, folder)
    write_table(table, results / "compare")
    if rows:
        draw(rows, results / "compare" / f"{folder}.png")
    return markdown(table)


def make_table(context: Context, folder: str) -> tuple[Table, list[tuple[str, float, tuple[float, float] | None]]]:
    """The table, and per arm (arm, average, interval) from the best to the worst for the figure."""
    evidence, searches = load_comparison(context, folder), Searches(context.results)
    block = evidence.blocks[folder]
    if not block.runs:
        frame = pd.DataFrame([{"method": "not run yet: make compare SCALE=mini DATA=<glue folder>"}])
        return Table(folder, "Comparison of methods", frame, _list_apart(block)), []
    health = {task: check_task(evidence, folder, task, searches) for task in block.tasks}
    tasks = [task for task, found in health.items() if found.is_comparable]
    arms = _sort_arms(evidence, block, tasks or block.tasks)
    reference = block.plan.reference if block.plan and block.plan.reference in block.arms else arms[0]
    found = {arm: _compare(evidence, folder, arm, reference, tasks) for arm in arms}
    tested = {arm: one.p for arm, one in found.items() if one is not None and one.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    forgotten = read_forgetting(context.results)
    rows = []
    for arm in arms:
        whole = evidence.compare(folder, arm, None, tasks) if tasks else None
        rows.append({
            "method": style_of(arm).name,
            **{task: format_score(block.scores(arm, task), block.metric(task)) for task in block.tasks},
            "average": format_averages(block, arm, tasks)["average"],
            "95 % of average": "" if whole is None or whole.interval is None else _plain_interval(whole.interval),
            **format_difference(found[arm], adjusted.get(arm), arm == reference, health),
            **_describe_cost(block, arm),
            **format_costs(evidence, block, arm, tasks, searches),
            **_describe_forgetting(block, arm, forgotten),
        })  # fmt: skip
    frame = pd.DataFrame(rows).rename(columns={"difference": f"minus {style_of(reference).name}"})
    notes = [*_describe_health(health), *NOTES, *_describe_unmerged(block), *_list_apart(block)]
    table = Table(folder, f"Comparison of {len(arms)} methods, MLP weights and head alone", frame, notes)
    return table, _make_points(evidence, folder, arms, tasks)


def _sort_arms(evidence: Evidence, block: Block, tasks: Sequence[str]) -> list[str]:
    """Arms from the best average to the worst; those that lack a task last."""
    sign = 1 if block.metric(tasks[0]) in LOWER_IS_BETTER else -1
    averages = {arm: block.averages(arm, tasks) for arm in block.arms}
    return sorted(
        averages, key=lambda arm: (not averages[arm], sign * mean(averages[arm]) if averages[arm] else 0.0, arm)
    )


def _compare(evidence: Evidence, folder: str, arm: str, reference: str, tasks: Sequence[str]) -> Difference | None:
    return evidence.compare(folder, arm, reference, tasks) if tasks and arm != reference else None


def _make_points(
    evidence: Evidence, folder: str, arms: Sequence[str], tasks: Sequence[str]
) -> list[tuple[str, float, tuple[float, float] | None]]:
    found = {arm: evidence.compare(folder, arm, None, tasks) for arm in arms} if tasks else {}
    return [(arm, one.value, one.interval) for arm, one in found.items() if one is not None]


def _plain_interval(interval: tuple[float, float]) -> str:
    return interval_text(interval).replace("+", "")


def _runs_of(block: Block, arm: str) -> list[EvidenceRun]:
    return [run for task in block.tasks for run in block.of(arm, task).values()]


def _describe_cost(block: Block, arm: str) -> dict[str, str]:
    """Trainable share of the MLP weights, steps/s and peak memory, of the runs."""
    runs = [run.record for run in _runs_of(block, arm)]
    shares = [share for run in runs if (share := _trained_share(run)) is not None]
    speeds = [float(rate) for run in runs if (rate := run.get("speed", {}).get("steps_per_second"))]
    peaks = [float(peak) for run in runs if (peak := _peak_mib(run.get("memory") or {})) is not None]
    return {
        "trainable": f"{100 * median(shares):.2f} %" if shares else "",
        "steps/s": f"{median(speeds):.2f}" if speeds else "",
        "peak MiB": f"{median(peaks):.0f}" if peaks else "",
    }


def _trained_share(record: Mapping[str, Any]) -> float | None:
    about = (record.get("trainable") or {}).get("mlp")
    return about["trained"] / about["total"] if about else None


def _peak_mib(memory: Mapping[str, Any]) -> float | None:
    numbers = [value for name, value in memory.items() if "mib" in name.lower() and isinstance(value, int | float)]
    return max(numbers, default=None)


def _describe_forgetting(block: Block, arm: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Loss on general text after training minus before, mean over the runs that were measured; empty without any."""
    changes = [
        found[key]["after"] - found[key]["before"] for run in _runs_of(block, arm) if (key := run.path.stem) in found
    ]
    return {"forgetting": f"{mean(changes):+.3f}"} if changes else {}


def _describe_health(health: Mapping[str, Health]) -> list[str]:
    lines = []
    for task, found in health.items():
        missing = f"; seeds not run yet: {'; '.join(found.missing)}" if found.missing else ""
        improving = f"{found.improving[0]} of {found.improving[1]} runs still improving at the end"
        lines.append(f"{task}: {found.verdict}; {improving}{missing}.")
    return lines


def _describe_unmerged(block: Block) -> list[str]:
    """The methods whose change cannot be merged into the weights, by their records."""
    names = {run.arm for run in block.all_runs() if (run.record.get("method") or {}).get("merges") is False}
    return [f"Evaluated unmerged, because peft cannot merge them: {', '.join(sorted(names))}."] if names else []


def _list_apart(block: Block) -> list[str]:
    failed = [f"Failed: {' '.join(key)}: {', '.join(reasons)}." for key, reasons in sorted(block.failed.items())]
    return [*(f"Not counted: {line}." for line in block.apart[:5]), *failed]
