"""Mini tables: each method compared with full fine-tuning and LoRA, over the tasks that both have."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import pandas as pd

from experiments.report.stats import welch_interval
from experiments.report.tables.accuracy import (
    AVERAGE,
    MINI_METHODS,
    MINI_RUNS,
    MINI_TASKS,
    PROTOCOLS,
    SIGNIFICANCE,
    Grid,
)
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table, caveat, interval_text, signed

REFERENCES = ("full", "lora")


@dataclass(frozen=True)
class Comparison:
    """One method compared with another.

    Attributes:
        tasks: tasks on which both methods have runs.
        difference: difference in points of the averages over these tasks, each a mean over seeds. If no seed has all
            tasks, the mean of the differences by task. None without common tasks.
        interval: 95 % Welch interval of the difference; None if a side has fewer than two seeds, or neither varies.
        higher, lower: tasks with a higher or lower mean; with a star if the task's own interval excludes 0.
        seeds: numbers of seeds of the two methods that have all these tasks.
    """

    tasks: tuple[str, ...]
    difference: float | None
    interval: tuple[float, float] | None
    higher: tuple[str, ...]
    lower: tuple[str, ...]
    seeds: tuple[int, int] = (0, 0)

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        if self.interval is None:
            return MISSING if self.difference is None else "too few seeds" if min(self.seeds) < 2 else "no spread"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no significant difference"


def compare(context: Context, protocol: str, method: str, other: str) -> Comparison:
    """Method minus other, over the tasks that both have."""
    every = _grid(context, protocol, MINI_TASKS)
    tasks = tuple(task for task in MINI_TASKS if every.values(method, task) and every.values(other, task))
    if not tasks:
        return Comparison((), None, None, (), ())
    pairs = {task: (every.values(method, task), every.values(other, task)) for task in tasks}
    differences = {task: mean(a) - mean(b) for task, (a, b) in pairs.items()}
    averages = _grid(context, protocol, tasks)  # its average counts only seeds that have all common tasks
    mine, theirs = averages.values(method, AVERAGE), averages.values(other, AVERAGE)
    difference = mean(mine) - mean(theirs) if mine and theirs else mean(differences.values())
    marked = {task: task + _star(welch_interval(a, b)) for task, (a, b) in pairs.items()}
    higher = tuple(marked[task] for task in tasks if differences[task] > 0)
    lower = tuple(marked[task] for task in tasks if differences[task] < 0)
    seeds = len(mine), len(theirs)
    return Comparison(tasks, difference, welch_interval(mine, theirs), higher, lower, seeds)


def _grid(context: Context, protocol: str, tasks: tuple[str, ...]) -> Grid:
    return Grid(context, "mini", "minilm", protocol, tasks)


def _star(interval: tuple[float, float] | None) -> str:
    return "*" if interval is not None and (interval[0] > 0 or interval[1] < 0) else ""


def table(context: Context) -> Table:
    """One row per protocol, method and reference."""
    rows = []
    for protocol in PROTOCOLS:
        for other in REFERENCES:
            for method in (one for one in MINI_METHODS if one != other):
                rows.append(_row(compare(context, protocol, method, other), protocol, method, other))
    notes = [
        "Difference in points between the averages over the tasks that both methods have; interval: two-sided 95 % "
        "Welch. n: seeds of each method that have all these tasks.",
        caveat(context.results),
        f"{SIGNIFICANCE} *: the interval of this task alone excludes 0. If all seeds of a method score the same as a "
        "constant prediction, its interval is too narrow; table5_mini counts such seeds.",
        MINI_RUNS,
    ]
    title = f"Mini tables: each method compared with full fine-tuning and LoRA ({MINI_MARK})"
    return Table("mini_verdict", title, pd.DataFrame(rows), notes)


def _row(found: Comparison, protocol: str, method: str, other: str) -> dict[str, str]:
    return {
        "protocol": protocol,
        "method": method,
        "against": other,
        "difference": MISSING if found.difference is None else signed(found.difference),
        "95 %": interval_text(found.interval),
        "result": "" if found.difference is None else found.verdict,
        "n": "" if found.difference is None else " / ".join(map(str, found.seeds)),
        "tasks": f"{len(found.tasks)} of {len(MINI_TASKS)}",
        "higher on": ", ".join(found.higher),
        "lower on": ", ".join(found.lower),
    }
