"""Tables 4, 9 and 10 (models on GLUE), and Table 5 (averages of 9 and 10)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.published import GLUE_MODELS, METHODS, TASKS, authors_runs, cells, contradictions, contradicts
from experiments.published import SEEDS as PAPER_SEEDS
from experiments.report.collect import Key
from experiments.report.stats import Summary, summarise, welch_interval
from experiments.report.tables.base import MISSING, Context, Table, hours, interval_text, list_apart, signed

PRINTED_AS = {9: "BERT", 10: "RoBERTa-base"}  # headings of Table 5
MODELS = GLUE_MODELS
TITLES = {4: "RoBERTa-large on GLUE", 9: "BERT-base on GLUE", 10: "RoBERTa-base on GLUE"}
PAPER_METHODS = ("full", "lora", "sparsegrad", "sparsegrad_authors", "meprop")
SEEDS = 3
CLOSE = 0.005  # points; the constant scores below have two decimals
LOGGED_SEEDS = (*PAPER_SEEDS, 37, 7777)  # they also logged seed 34, that of their searches
AVERAGE = "average"
EDITIONS = {
    4: ["The average of Regular FT is 85.6 in one edition of the paper and 84.7 in another; its cells average 85.69."]
}
ROWS = {method: row for row, method in METHODS.items()} | {"sparsegrad_authors": "SparseGrad"}
HEADINGS = {task: column for column, task in TASKS.items()}
SCORES = "Scores in points: Matthews for CoLA, Pearson for STS-B, accuracy otherwise; mean ± sample std over seeds."
# Scores of a constant prediction: 0 for Matthews and Pearson, the share of the majority class for accuracy.
CONSTANT = {"cola": 0.0, "stsb": 0.0, "mrpc": 68.38}
COLLAPSED = "k const.: k of the seeds score the same as a constant prediction (0 on CoLA and STS-B, 68.38 on MRPC)."
WELCH = (
    "Interval: two-sided 95 % Welch interval of the difference from full fine-tuning; if it contains 0, the difference "
    "is not significant. Intervals are not corrected for multiple comparisons."
)


class Grid:
    """The cells of one model and protocol, by method and task."""

    def __init__(self, context: Context, folder: str, model: str, protocol: str, tasks: Sequence[str]) -> None:
        self.store, self.tasks = context.store, tasks
        self.folder, self.where = folder, (folder, model, protocol)

    def key(self, method: str, task: str) -> Key:
        """The key of a cell in the store."""
        folder, model, protocol = self.where
        return folder, model, method, task, protocol

    def values(self, method: str, task: str) -> list[float]:
        """Scores in order of seeds; for `average`, the mean over tasks of each seed that has all of them."""
        if task != AVERAGE:
            return self.store.values(self.key(method, task))
        by_task = [self.store.by_seed(self.key(method, one)) for one in self.tasks]
        # Averages of different task sets are not comparable, so a seed must have all tasks.
        seeds = set.intersection(*(set(of) for of in by_task)) if by_task else set()
        return [sum(of[seed] for of in by_task) / len(by_task) for seed in sorted(seeds)]

    def cost(self, method: str, task: str) -> float | None:
        """Total hours of all seeds."""
        tasks = self.tasks if task == AVERAGE else [task]
        spent = [cost for one in tasks if (cost := self.store.cost(self.key(method, one))) is not None]
        return sum(spent) if spent else None

    def failures(self, method: str, task: str) -> list[str]:
        """Reasons of the seeds that failed."""
        return [] if task == AVERAGE else self.store.failures(self.key(method, task))

    def line(self, method: str, task: str) -> dict[str, str]:
        """Our columns of a row."""
        values = self.values(method, task)
        ours, failed = summarise(values), self.failures(method, task)
        interval = None if method == "full" else welch_interval(values, self.values("full", task))
        absent = "failed: " + "; ".join(failed) if failed else MISSING
        return {
            "ours": str(ours) + constant(values, task) if ours else absent,
            "vs full, 95 %": interval_text(interval),
            "n": str(ours.n if ours else 0) + (f" of {SEEDS}" if (ours.n if ours else 0) < SEEDS else ""),
            "protocol": self.where[2],
            "hours": hours(self.cost(method, task)),
        }

    def records(self, methods: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
        """(label, records) of every cell that has records."""
        for method in methods:
            for task in self.tasks:
                paths = [run.path for run in self.store.counting(self.key(method, task))]
                if paths:
                    yield f"{method} {task} {self.where[2]}", paths


def constant(values: Sequence[float], task: str) -> str:
    """Remark with the number of seeds that score the same as a constant prediction; empty for none."""
    count = sum(task in CONSTANT and abs(value - CONSTANT[task]) < CLOSE for value in values)
    return f" ({count} const.)" if count else ""


def explain_constant(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The note on the remarks of `constant`, if a row has one."""
    return [COLLAPSED] if any("const.)" in row["ours"] for row in rows) else []


def per_task(context: Context, number: int) -> Table:
    """Table 4, 9 or 10: ours next to the published cells and the authors' logs."""
    tasks, model = tuple(TASKS.values()), MODELS[number]
    grid = Grid(context, f"glue_{model}", model, "paper", tasks)
    rows = [_row(grid, number, method, task) for method in PAPER_METHODS for task in (*tasks, AVERAGE)]
    return Table(
        f"table{number}",
        f"Table {number}: {TITLES[number]}",
        pd.DataFrame(rows),
        [
            SCORES,
            WELCH,
            *_logged(number),
            *contradicted(number),
            *EDITIONS.get(number, ()),
            *_trainable(number),
            *explain_constant(rows),
            *list_apart(grid.store.apart(grid.folder)),
        ],
        dict(grid.records(PAPER_METHODS)),
    )


def _trainable(number: int) -> list[str]:
    """Notes on the trainable parameters as printed, beside those that the authors logged for LoRA."""
    printed, of = cells(number), "#Trainable params: "
    counts = [f"{row} {printed[row, of + 'Model'][0]} / {printed[row, of + 'MLP layer'][0]}" for row in METHODS]
    notes = [f"Trainable parameters as printed, of the model / of an MLP layer: {'; '.join(counts)}."]
    logged = sorted(set(authors_runs(MODELS[number], "lora", "cola")["trainable"].dropna().astype(int)))
    millions = float(printed["LoRA", of + "Model"][0].split()[0])
    if len(logged) == 1 and abs(logged[0] / 1e6 - millions) >= 1:  # more than rounding or cutting off explains
        notes.append(
            f"The printed count of LoRA contradicts the authors' own log: {logged[0]:,} parameters "
            "(GitHub sayankotor/sparse_grads)."
        )
    return notes


def _row(grid: Grid, number: int, method: str, task: str) -> dict[str, str]:
    column = "AVG" if task == AVERAGE else HEADINGS[task]
    published, std = cells(number)[ROWS[method], column]
    mark = contradicts(number, ROWS[method]) if task == AVERAGE else ""
    logged = logs(MODELS[number], "sparsegrad" if method == "sparsegrad_authors" else method, task, grid.tasks)
    ours, line = summarise(grid.values(method, task)), grid.line(method, task)
    return {
        "method": method,
        "task": task,
        "published": published + (f" ± {std}" if std else "") + mark,
        "authors' logs": str(logged) if logged else "none",
        "logs' n": str(logged.n) if logged and task != AVERAGE else "",
        "ours": line.pop("ours"),
        "difference": signed(ours.mean - float(published)) if ours else "",
        **line,
    }


def logs(
    model: str, method: str, task: str, tasks: Sequence[str], seeds: tuple[int, ...] = PAPER_SEEDS
) -> Summary | None:
    """A cell in the authors' logs, for the paper's seeds or others; `average` is the mean of the means of tasks."""
    if task != AVERAGE:
        scores = authors_runs(model, method, task, seeds)["score"].dropna()
        return summarise([100 * float(score) for score in scores])
    found = [logs(model, method, one, tasks, seeds) for one in tasks]  # tasks weigh the same, whatever their runs
    means = [one.mean for one in found if one is not None]
    return Summary(sum(means) / len(means), None, len(means)) if len(means) == len(tasks) else None


def _logged(number: int) -> list[str]:
    """Note on the seeds in the column of the logs, and the averages with the seeds that it leaves out."""
    tasks, model = tuple(TASKS.values()), MODELS[number]
    wider = {method: logs(model, method, AVERAGE, tasks, LOGGED_SEEDS) for method in ("full", "lora", "sparsegrad")}
    said = ", ".join(f"{method} {one.mean:.2f}" for method, one in wider.items() if one)
    more = f" With their further seeds 37 and 7777 the averages are {said}." if said else ""
    return [f"Authors' logs, {model}: the paper's seeds {', '.join(map(str, PAPER_SEEDS))}.{more}"]


def contradicted(number: int) -> list[str]:
    """A note on the printed averages of a table that contradict its cells."""
    lines = contradictions(number)
    return [f"Table {number}, printed averages that contradict their cells: {'; '.join(lines)}."] if lines else []


def averages(context: Context) -> Table:
    """Table 5: the averages of Tables 9 and 10."""
    rows: list[dict[str, str]] = []
    records: dict[str, list[Path]] = {}
    for number in (9, 10):
        tasks, model = tuple(TASKS.values()), MODELS[number]
        grid = Grid(context, f"glue_{model}", model, "paper", tasks)
        for method in PAPER_METHODS:
            row = _row(grid, number, method, AVERAGE)
            row.pop("task")
            params = cells(5)[ROWS[method], f"{PRINTED_AS[number]} params"][0]
            rows.append({"model": model, "method": row.pop("method"), "published params": params, **row})
        records |= {f"{model} {label}": paths for label, paths in grid.records(PAPER_METHODS)}
    notes = [SCORES, WELCH, *(line for number in (9, 10) for line in (*_logged(number), *contradicted(number)))]
    notes += list_apart([line for number in (9, 10) for line in context.store.apart(f"glue_{MODELS[number]}")])
    return Table("table5", "Table 5: averages on GLUE", pd.DataFrame(rows), notes, records)
