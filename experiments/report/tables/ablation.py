"""Tables 11 and 12: kept entries of SparseGrad; as table, and as the curve that figures draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.published import METHODS, TASKS, cells, contradicts
from experiments.report.stats import Summary, summarise
from experiments.report.tables.accuracy import AVERAGE, COLLAPSED, MINI_RUNS, SCORES, Grid
from experiments.report.tables.base import MINI_MARK, Context, Table, signed

SIZE = 768 * 3072
KEPT = (18000, 22000, 28000, 30000, 100000, SIZE)
MODELS = {11: "bert_base", 12: "roberta_base"}
MAIN = {11: 9, 12: 10}  # the table of the same model on all tasks
# Rows as printed; the paper has no row for 100,000 in Table 12 nor for 30,000 in Table 11.
PRINTED = {
    11: {18000: "0.8% remained", 22000: "1% remained", 28000: "1.2% remained", 100000: "4.2% remained"},
    12: {18000: "0.8% remained", 22000: "1% remained", 28000: "1.2% remained", 30000: "1.4% remained"},
}
ROUNDED = {12: ['The row printed as "1.4% remained" is shown at 30,000 (1.27 %), the paper\'s nearest count.']}
ALL = "100% remained"
MINI_TASKS = ("stsb", "mrpc")
MINI_SCALE = 4  # a weight of MiniLM has a quarter of BERT's entries


@dataclass(frozen=True)
class Point:
    """One point of the curve: kept share in per cent, and the average over tasks."""

    share: float
    value: Summary


def table(context: Context, number: int) -> Table:
    """Table 11 or 12."""
    grid = _grid(context, number)
    rows = [_row(grid, number, keep, task) for keep in KEPT for task in (*grid.tasks, AVERAGE)]
    notes = [
        SCORES,
        "The SST-2 column is lost; printed averages are over eight tasks, ours over the seven that are printed. What "
        f"they imply for SST-2, to 0.8 either way: {implied(number)}.",
        *ROUNDED.get(number, ()),
        *copied(number),
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
    comparable = ours is not None and published and task != AVERAGE
    return {
        "kept": _kept(keep),
        "share": f"{100 * keep / SIZE:.2f} %",
        "task": task,
        "published": (published + (f" ± {std}" if std else "") + mark) or "none",
        "ours": line["ours"],
        "difference": signed(ours.mean - float(published)) if ours is not None and comparable else "",
        "n": line["n"],
        "protocol": line["protocol"],
        "hours": line["hours"],
    }


def _kept(keep: int, scale: int = 1) -> str:
    return "all" if keep == SIZE else f"{keep // scale:,}"


def _records(grid: Grid, scale: int = 1) -> dict[str, list[Path]]:
    """Label and records of every cell; labels begin as the rows do."""
    found: dict[str, list[Path]] = {}
    for keep in KEPT:
        method = f"sparsegrad@{keep // scale}"
        found |= {label.replace(method, _kept(keep, scale)): paths for label, paths in grid.records([method])}
    return found


def copied(number: int) -> list[str]:
    """The "100 %" row beside the main table's: the paper printed the 1 % results in its place."""
    main = MAIN[number]
    row = next(name for name, method in METHODS.items() if method == "sparsegrad")
    tasks = [column for column in TASKS if (ALL, column) in cells(number)]
    if all(cells(number)[ALL, column] == cells(main)[row, column] for column in tasks):
        return [f'The printed row "{ALL}" equals the SparseGrad row of Table {main} in all {len(tasks)} cells.']
    return []


def implied(number: int) -> str:
    """SST-2 of each printed row: eight times its average less its seven cells."""
    found = {}
    for row in (*PRINTED[number].values(), ALL):
        of = [float(value) for (name, column), (value, _) in cells(number).items() if name == row and column in TASKS]
        found[row] = (len(TASKS) * float(cells(number)[row, "AVG"][0])) - sum(of)
    return ", ".join(f"{row} {value:.1f}" for row, value in found.items())


def mini(context: Context) -> Table:
    """The ablation on MiniLM at the same densities."""
    grid = _mini_grid(context)
    rows = []
    for keep in KEPT:
        method = f"sparsegrad@{keep // MINI_SCALE}"
        for task in (*MINI_TASKS, AVERAGE):
            line = grid.line(method, task)
            line.pop("vs full, 95 %")
            rows.append({"kept": _kept(keep, MINI_SCALE), "share": f"{100 * keep / SIZE:.2f} %", "task": task, **line})
    notes = [
        SCORES + " " + COLLAPSED,
        "Same densities as the paper's {18000, 22000, 28000, 30000, 100000, all} of 2,359,296; all at one rate, which "
        "was chosen for 1 %. " + MINI_RUNS,
        *whole_against_one_percent(context),
    ]
    title = f"Tables 11 and 12 in small: MiniLM ({MINI_MARK})"
    return Table("table11_mini", title, pd.DataFrame(rows), notes, _records(grid, MINI_SCALE))


def whole_against_one_percent(context: Context) -> list[str]:
    """All entries minus about 1 % of them, by task and on average."""
    every, few = (keep // MINI_SCALE for keep in (SIZE, KEPT[1]))
    said = _mini_grid(context).differences(f"sparsegrad@{every}", f"sparsegrad@{few}")
    return [f"All entries minus {few:,} of them, 95 % Welch: {said}."] if said else []


def mini_curve(context: Context) -> list[Point]:
    """The averages over tasks of the mini ablation; points without a seed are left out."""
    return _curve(_mini_grid(context), MINI_SCALE)


def curve(context: Context, number: int) -> list[Point]:
    """The same of the paper's model in Table 11 or 12."""
    return _curve(_grid(context, number), 1)


def _curve(grid: Grid, scale: int) -> list[Point]:
    found = [(keep, summarise(grid.values(f"sparsegrad@{keep // scale}", AVERAGE))) for keep in KEPT]
    return [Point(100 * keep / SIZE, value) for keep, value in found if value is not None]


def published_curve(number: int) -> list[tuple[float, float]]:
    """(share in per cent, printed average)."""
    rows = [*PRINTED[number].items(), (SIZE, ALL)]
    return [(100 * keep / SIZE, float(cells(number)[row, "AVG"][0])) for keep, row in rows]


def _grid(context: Context, number: int) -> Grid:
    tasks = tuple(task for task in TASKS.values() if task != "sst2")
    return Grid(context, f"ablation_{MODELS[number]}", MODELS[number], "paper", tasks)


def _mini_grid(context: Context) -> Grid:
    return Grid(context, "mini_ablation", "minilm", "paper", MINI_TASKS)
