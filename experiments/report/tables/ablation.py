"""Tables 11 and 12: score of SparseGrad by number of kept entries, as tables and as curves for figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.published import METHODS, TASKS, cells, contradicts
from experiments.report.evidence import load_evidence
from experiments.report.stats import Summary, summarise
from experiments.report.tables.accuracy import AVERAGE, SCORES, Grid, explain_constant
from experiments.report.tables.base import Context, Table, list_apart, signed
from experiments.report.tables.main_tables import averaged_tasks

SIZE = 768 * 3072
KEPT = (18000, 22000, 28000, 30000, 100000, SIZE)
MODELS = {11: "bert_base", 12: "roberta_base"}
MAIN = {11: 9, 12: 10}  # table of the same model on all tasks
# Names of printed rows; the paper has no row for 30,000 in Table 11 and none for 100,000 in Table 12.
PRINTED = {
    11: {18000: "0.8% remained", 22000: "1% remained", 28000: "1.2% remained", 100000: "4.2% remained"},
    12: {18000: "0.8% remained", 22000: "1% remained", 28000: "1.2% remained", 30000: "1.4% remained"},
}
ROUNDED = {12: ['The row printed as "1.4% remained" is shown at 30,000 (1.27 %), the nearest of the paper\'s counts.']}
ALL = "100% remained"
MINI_SIZE = 384 * 1536  # entries of a weight of MiniLM


@dataclass(frozen=True)
class Point:
    """One point of the curve: density in per cent, and the average score over tasks."""

    share: float
    value: Summary


def table(context: Context, number: int) -> Table:
    """Table 11 or 12."""
    grid = _grid(context, number)
    rows = [_row(grid, number, keep, task) for keep in KEPT for task in (*grid.tasks, AVERAGE)]
    notes = [
        SCORES,
        "The paper prints no SST-2 column. Printed averages are over eight tasks, ours over the seven printed ones. "
        f"The printed averages imply these SST-2 scores, within 0.8 points: {implied(number)}.",
        *ROUNDED.get(number, ()),
        *copied(number),
        *explain_constant(rows),
        *list_apart(grid.store.apart(grid.folder)),
    ]
    title = f"Table {number}: kept entries, {MODELS[number]}"
    return Table(f"table{number}", title, pd.DataFrame(rows), notes, _records(grid))


def _row(grid: Grid, number: int, keep: int, task: str) -> dict[str, str]:
    column = "AVG" if task == AVERAGE else next(name for name, of in TASKS.items() if of == task)
    row = ALL if keep == SIZE else PRINTED[number].get(keep)
    published, std = ("", "") if row is None else cells(number)[row, column]
    method = f"sparsegrad@{keep}"
    line, ours = grid.line(method, task), summarise(grid.values(method, task))
    mark = contradicts(MAIN[number], "SparseGrad") if (row, column) == (ALL, "AVG") and copied(number) else ""
    # Averages are not comparable: the printed ones include SST-2.
    comparable = ours is not None and published and task != AVERAGE
    return {
        "kept": _format_kept(keep),
        "share": f"{100 * keep / SIZE:.2f} %",
        "task": task,
        "published": (published + (f" ± {std}" if std else "") + mark) or "none",
        "ours": line["ours"],
        "difference": signed(ours.mean - float(published)) if ours is not None and comparable else "",
        "n": line["n"],
        "protocol": line["protocol"],
        "hours": line["hours"],
    }


def _format_kept(keep: int) -> str:
    return "all" if keep == SIZE else f"{keep:,}"


def _records(grid: Grid) -> dict[str, list[Path]]:
    """Label -> records of every cell; labels start with the number of kept entries, like the rows."""
    found: dict[str, list[Path]] = {}
    for keep in KEPT:
        method = f"sparsegrad@{keep}"
        found |= {label.replace(method, _format_kept(keep)): paths for label, paths in grid.records([method])}
    return found


def copied(number: int) -> list[str]:
    """A note if the printed "100 %" row repeats the SparseGrad row of the main table, which has 1 % of the entries."""
    main = MAIN[number]
    row = next(name for name, method in METHODS.items() if method == "sparsegrad")
    tasks = [column for column in TASKS if (ALL, column) in cells(number)]
    if all(cells(number)[ALL, column] == cells(main)[row, column] for column in tasks):
        return [f'The printed row "{ALL}" equals the SparseGrad row of Table {main} in all {len(tasks)} cells.']
    return []


def implied(number: int) -> str:
    """SST-2 score that each printed row implies: eight times its average minus its seven cells."""
    found = {}
    for row in (*PRINTED[number].values(), ALL):
        of = [float(value) for (name, column), (value, _) in cells(number).items() if name == row and column in TASKS]
        found[row] = (len(TASKS) * float(cells(number)[row, "AVG"][0])) - sum(of)
    return ", ".join(f"{row} {value:.1f}" for row, value in found.items())


def evidence_curve(context: Context) -> list[Point]:
    """Averages over the comparable tasks of the arms of evidence_density that have enough seeds on all of them."""
    folder = "evidence_density"
    tasks, block = averaged_tasks(context, folder), load_evidence(context).blocks[folder]
    # Not only the paper's counts: the plan has others, where a break would show.
    arms = {arm: int(kept) for arm in block.arms if (kept := arm.partition("keep=")[2]).isdigit()}
    whole = [arm for arm in arms if tasks and block.tasks_of(arm, None, tasks) == tasks]
    found = [(100 * arms[arm] / MINI_SIZE, block.average(arm, tasks)) for arm in whole]
    return sorted((Point(share, value) for share, value in found if value is not None), key=lambda point: point.share)


def curve(context: Context, number: int) -> list[Point]:
    """The same for our runs of the paper's model in Table 11 or 12."""
    grid = _grid(context, number)
    found = [(keep, summarise(grid.values(f"sparsegrad@{keep}", AVERAGE))) for keep in KEPT]
    return [Point(100 * keep / SIZE, value) for keep, value in found if value is not None]


def published_curve(number: int) -> list[tuple[float, float]]:
    """(density in per cent, printed average) of each printed row."""
    rows = [*PRINTED[number].items(), (SIZE, ALL)]
    return [(100 * keep / SIZE, float(cells(number)[row, "AVG"][0])) for keep, row in rows]


def _grid(context: Context, number: int) -> Grid:
    tasks = tuple(task for task in TASKS.values() if task != "sst2")
    return Grid(context, f"ablation_{MODELS[number]}", MODELS[number], "paper", tasks)
