"""The table and the figure of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pandas as pd

from experiments.palette import order_of, style_of
from experiments.report.clock import Clock, make_clock
from experiments.report.collect import collect_cells
from experiments.report.comparison import notes
from experiments.report.comparison.block import load_comparison
from experiments.report.comparison.figure import Point, draw, remove_figure
from experiments.report.comparison.forgotten import read_forgetting
from experiments.report.evidence import Evidence
from experiments.report.gates import Health, check_task
from experiments.report.origins import origin_notes
from experiments.report.render import markdown, write_table
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches
from experiments.report.stats import Difference, adjust
from experiments.report.tables.base import Context, Table, interval_text
from experiments.report.tables.evidence_cells import (
    format_costs,
    format_difference,
    format_score,
    format_trainable,
    median_share,
)
from experiments.report.tables.main_tables import apart_notes

FOLDER = "compare"  # of tables and figures, below the results folder

Forgetting = Mapping[str, Mapping[str, float]]
"""Key of a run -> its losses `before` and `after`."""


@dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        name: of the arm.
        tasks: the comparable tasks on which it has enough seeds, or any; without a comparable task, all of its tasks.
        is_partial: whether other arms have more tasks.
        average: over `tasks`; None without a comparable one.
        difference: from the reference, over the tasks that both have; None without any.
    """

    name: str
    tasks: tuple[str, ...]
    is_partial: bool
    average: Difference | None
    difference: Difference | None

    @property
    def label(self) -> str:
        """Its name in the table; with its tasks, if other arms have more."""
        return (
            f"{style_of(self.name).name} ({', '.join(self.tasks)} only)"
            if self.is_partial
            else style_of(self.name).name
        )


def write_comparison(results: Path, folder: str) -> str:
    """Write table and figure to `<results>/compare` if there are runs; the table as Markdown.

    Raises:
        UserError: for a damaged record or plan, or a folder that cannot be written.
    """
    return markdown(write_files(Context(results, collect_cells(results / "runs"), "mini"), folder))


def write_files(context: Context, folder: str) -> Table:
    """As `write_comparison`, from results that are read already; the table."""
    table, points = make_table(context, folder)
    if is_empty(table):  # a comparison that failed must not replace the table of an earlier one
        return table
    write_table(table, context.results / table.folder)
    picture = context.results / table.folder / f"{folder}.png"
    if points:
        draw(points, notes.PLANS[folder].score, picture)
    else:
        remove_figure(picture)  # an earlier one would show what cannot be compared
    return table


def is_empty(table: Table) -> bool:
    """Whether a table only says how its runs are made: one with runs has their scores beside the methods."""
    return list(table.frame.columns) == ["method"]


def make_table(context: Context, folder: str) -> tuple[Table, list[Point]]:
    """The table, and the points of the figure from the best to the worst."""
    evidence, searches = load_comparison(context, folder), Searches(context.results)
    block, about = evidence.blocks[folder], notes.PLANS[folder]
    if not block.runs:
        frame = pd.DataFrame([{"method": f"not run yet: {about.command}"}])
        return Table(folder, f"Comparison of methods: {about.title}", frame, apart_notes(block), folder=FOLDER), []
    health = {task: check_task(evidence, folder, task, searches) for task in block.tasks}
    reference = choose_reference(block)
    tasks = [task for task, found in health.items() if found.is_comparable]
    arms = _sort_arms(block, [_compare_arm(evidence, block, name, reference, tasks) for name in block.arms])
    clock = make_clock(block, {})  # the benchmark lacks most of the methods
    frame = _make_frame(evidence, block, arms, reference, health, searches, clock, read_forgetting(context.results))
    lines = [*_list_notes(block, arms, reference, health), clock.about, *origin_notes(block, searches)]
    lines += [notes.FORGETTING] if "forgetting" in frame else []
    title, below = f"Comparison of {len(arms)} methods: {about.title}", [*lines, *apart_notes(block)]
    return Table(folder, title, frame, below, _list_records(block, arms), FOLDER), _make_points(arms)


def choose_reference(block: Block) -> str:
    """The plan's reference; if it has no runs, the plan's first method that has.

    Never the best one: a reference that is chosen by its score makes every difference from it too large.
    """
    arms, plan = block.arms, block.plan
    if plan is not None and plan.reference in arms:
        return plan.reference
    order = list(plan.grid.get("method", ())) if plan is not None else []

    def rank(arm: str) -> tuple[bool, int, str]:
        method = arm.partition(" ")[0]
        return block.is_floor(arm), order.index(method) if method in order else len(order), arm

    return min(arms, key=rank)


def _compare_arm(evidence: Evidence, block: Block, name: str, reference: str, tasks: Sequence[str]) -> Arm:
    shown = tasks or block.tasks
    own = tuple(block.tasks_of(name, None, tasks) if tasks else [task for task in shown if block.of(name, task)])
    average = evidence.compare(block.folder, name, None, own) if tasks and own else None
    both = block.tasks_of(name, reference, own)
    difference = evidence.compare(block.folder, name, reference, both) if tasks and both and name != reference else None
    return Arm(name, own, len(own) < len(shown), average, difference)


def _sort_arms(block: Block, arms: Sequence[Arm]) -> list[Arm]:
    """The best average first; arms with fewer tasks or too few seeds below, each set of tasks by itself.

    Without a comparable task, in the usual order of methods: no average says which is better.
    """
    sign = 1 if block.is_loss else -1

    def rank(arm: Arm) -> tuple[Any, ...]:
        if arm.average is None:
            return (2, 0, (), order_of(arm.name))  # below those with an average
        places = tuple(block.tasks.index(task) for task in arm.tasks)
        return not arm.average.has_seeds, -len(places), places, sign * arm.average.value, arm.name

    return sorted(arms, key=rank)


def _make_frame(
    evidence: Evidence, block: Block, arms: Sequence[Arm], reference: str, health: Mapping[str, Health],
    searches: Searches, clock: Clock, forgotten: Forgetting,
) -> pd.DataFrame:  # fmt: skip
    """One row per arm; columns that would be empty are left out."""
    adjusted = adjust({arm.name: arm.difference for arm in arms})
    is_any = any(found.is_comparable for found in health.values())
    rows = []
    for arm in arms:
        tasks = arm.tasks if is_any else ()
        rows.append({
            "method": arm.label,
            **{task: format_score(block.scores(arm.name, task), block.metric(task)) for task in block.tasks},
            "average": _format_average(block, arm),
            "95 % of average": "" if arm.average is None else _plain_interval(arm.average.interval),
            **format_difference(
                arm.difference, adjusted.get(arm.name), arm.name == reference, health, len(adjusted), arm.tasks,
                block.is_loss,
            ),
            **_describe_cost(block, arm, clock),
            **format_costs(evidence, block, arm.name, tasks, searches, clock),
            **_describe_forgetting(block, arm, forgotten),
        })  # fmt: skip
    frame = pd.DataFrame(rows).rename(columns={"difference": f"minus {style_of(reference).name}"})
    return frame.loc[:, (frame != "").any()]


def _format_average(block: Block, arm: Arm) -> str:
    """The number that the rows are sorted by, its spread over the seeds that have all tasks, and the fewest seeds."""
    if arm.average is None:
        return ""
    digits, values = 3 if block.is_loss else 2, block.averages(arm.name, arm.tasks)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{arm.average.value:.{digits}f}{spread} ({arm.average.seeds})"


def _list_notes(block: Block, arms: Sequence[Arm], reference: str, health: Mapping[str, Health]) -> list[str]:
    shares = {arm.name: share for arm in arms if (share := median_share(block, arm.name)) is not None}
    return [
        *notes.describe_health(health),
        *notes.describe_reference(block, reference),
        *notes.describe_partial([arm.label for arm in arms if arm.is_partial]),
        *notes.describe_sizes(block, shares),
        *notes.describe_floors(block),
        *notes.describe_scores(block.is_loss),
        *notes.describe_unmerged(block),
    ]


def _list_records(block: Block, arms: Sequence[Arm]) -> dict[str, list[Path]]:
    """Label of a score cell -> its records; the label is the row's name and the column's."""
    return {
        f"{arm.label} {task}": [run.path for run in runs.values()]
        for arm in arms
        for task in block.tasks
        if (runs := block.of(arm.name, task))
    }


def _make_points(arms: Sequence[Arm]) -> list[Point]:
    return [
        Point(arm.name, arm.label, arm.average.value, arm.average.interval, arm.is_partial)
        for arm in arms
        if arm.average is not None
    ]


def _plain_interval(interval: tuple[float, float] | None) -> str:
    return interval_text(interval).replace("+", "")


def _describe_cost(block: Block, arm: Arm, clock: Clock) -> dict[str, str]:
    """Trainable share of the MLP weights, and on its tasks, peak memory and steps/s, if these come from one machine."""
    runs = [run.record for run in _runs_of(block, arm)]
    speeds = [float(rate) for run in runs if (rate := run.get("speed", {}).get("steps_per_second"))]
    peaks = [float(peak) for run in runs if (peak := _peak_mib(run.get("memory") or {})) is not None]
    return {
        **format_trainable(block, arm.name),
        "steps/s": f"{median(speeds):.2f}" if speeds and clock.is_known else "",
        "peak MiB": f"{median(peaks):.0f}" if peaks else "",
    }


def _runs_of(block: Block, arm: Arm) -> list[EvidenceRun]:
    """The runs of a row: those on its tasks."""
    return [run for task in arm.tasks for run in block.of(arm.name, task).values()]


def _peak_mib(memory: Mapping[str, Any]) -> float | None:
    numbers = [value for name, value in memory.items() if "mib" in name.lower() and isinstance(value, int | float)]
    return max(numbers, default=None)


def _describe_forgetting(block: Block, arm: Arm, found: Forgetting) -> dict[str, str]:
    """Loss on general text after training minus before, and the number of runs on its tasks that were measured."""
    if not any(run.path.stem in found for run in block.all_runs()):
        return {}
    keys = [run.path.stem for run in _runs_of(block, arm) if run.path.stem in found]
    changes = [found[key]["after"] - found[key]["before"] for key in keys]
    return {"forgetting": f"{mean(changes):+.3f} ({len(changes)})" if changes else "not measured"}
