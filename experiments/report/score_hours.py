"""Score over hours to a common target, one panel per regime, with intervals and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.labels import label_points
from experiments.palette import style_of
from experiments.report.blocks import BLOCKS
from experiments.report.clock import Clock, hours_to_target, make_clock, training_hours
from experiments.report.evidence import load_evidence
from experiments.report.tables.base import Context
from experiments.report.tables.costs import measured
from experiments.report.tables.main_tables import averaged_tasks

PANELS = ("evidence_paper", "evidence_mlp_only")


@dataclass(frozen=True)
class Point:
    """One arm over all comparable tasks: hours, average score, interval, seeds, and whether it reaches the target."""

    arm: str
    hours: float
    score: float
    interval: tuple[float, float] | None
    reaches: bool
    seeds: int = 0


def points(context: Context, folder: str) -> list[Point]:
    """The arms of a block that have enough seeds on every task of its averages, and known times."""
    evidence, tasks = load_evidence(context), averaged_tasks(context, folder)
    block, found = evidence.blocks[folder], []
    clock = _make_clock(context, folder)
    for arm in block.arms if tasks else ():
        if block.tasks_of(arm, None, tasks) != tasks:
            continue
        score = evidence.compare(folder, arm, None, tasks)
        target = hours_to_target(evidence, block, arm, tasks, clock)
        if target.unknown and not target.missed:
            continue  # it reaches the target, at an unknown time
        reached = target.hours
        spent = training_hours(block, arm, tasks, clock) if reached is None else reached
        if score is not None and spent is not None:
            found.append(Point(arm, spent, score.value, score.interval, reached is not None, score.seeds))
    return found


def _make_clock(context: Context, folder: str) -> Clock:
    return make_clock(load_evidence(context).blocks[folder], measured(context.results)[1])


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both score and hours, among those that reach the target."""
    able = [one for one in found if one.reaches]
    return sorted((one for one in able if not any(_beats(other, one) for other in able)), key=lambda point: point.hours)


def _beats(a: Point, b: Point) -> bool:
    return a.hours <= b.hours and a.score >= b.score and (a.hours, a.score) != (b.hours, b.score)


def draw(context: Context) -> Figure | None:
    """One panel per regime with runs; None without any."""
    panels = {folder: found for folder in PANELS if (found := points(context, folder))}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.4), layout="constrained", squeeze=False)
    for axis, (folder, found) in zip(axes[0], panels.items(), strict=True):
        for point in found:
            _draw_point(axis, point)
        best = front(found)
        line = [one.hours for one in best], [one.score for one in best]
        axis.plot(*line, color="gray", linewidth=1, zorder=0)
        axis.margins(x=0.3, y=0.12)
        tasks = ", ".join(averaged_tasks(context, folder))
        seeds = min(point.seeds for point in found)
        speed = "the benchmark's steps/s" if _make_clock(context, folder).speeds else "the runs' own steps/s, rough"
        hours = f"hours to the target, all tasks, at {speed}"
        axis.set(title=f"{BLOCKS[folder].title}\n{tasks}, {seeds} seeds", xlabel=hours)
    axes[0][0].set_ylabel("average score, points, with 95 % interval")
    said = (
        "gray line: Pareto front of the means; hollow: a seed misses the target, so at its training hours\n"
        "paired differences are in the table"
    )
    figure.supxlabel(said, fontsize=8)
    for axis, found in zip(axes[0], panels.values(), strict=True):  # last: the labels need the final layout
        spans = [(one.hours, *one.interval) for one in found if one.interval]
        label_points(axis, [(one.hours, one.score, style_of(one.arm).name) for one in found], spans)
    return figure


def _draw_point(axis: Any, point: Point) -> None:
    style = style_of(point.arm)
    low, high = point.interval or (point.score, point.score)
    face = style.colour if point.reaches else "none"
    axis.errorbar(
        point.hours, point.score, yerr=[[point.score - low], [high - point.score]], fmt=style.marker,
        color=style.colour, markerfacecolor=face, markersize=8, capsize=2,
    )  # fmt: skip
