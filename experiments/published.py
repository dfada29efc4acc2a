"""Numbers of others: the paper's printed cells and the authors' logged runs; see experiments/data/README.md."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd

from experiments.paths import DATA
from sparsegrad.errors import UserError

COLUMNS = {
    "published.csv": ("table", "row", "column", "value", "std"),
    "authors_runs.csv": (
        "model", "method", "task", "seed", "score", "batch_size", "epochs", "hours", "true_steps_per_second",
        "logged_steps_per_second", "train_peak_mb", "eval_peak_mb", "trainable",
    ),
}  # fmt: skip
# Our names for the paper's rows and columns.
METHODS = {"Regular FT": "full", "LoRA": "lora", "SparseGrad": "sparsegrad", "MeProp": "meprop"}
TASKS = {"STSB": "stsb", "CoLA": "cola", "MNLI": "mnli", "MRPC": "mrpc", "QNLI": "qnli", "QQP": "qqp", "RTE": "rte"}
TASKS |= {"SST2": "sst2"}
METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}  # of the printed scores; of other tasks, accuracy
GLUE_MODELS = {4: "roberta_large", 9: "bert_base", 10: "roberta_base"}  # table -> model, scores per task
SEEDS = (42, 3705, 2023)  # the paper's; the authors' logs have runs with other seeds too


@functools.cache  # callers must not modify the frame
def read(file: str, folder: Path = DATA) -> pd.DataFrame:
    """One of the CSV files; all cells of published.csv are read as text.

    Raises:
        UserError: when it cannot be read or has other columns than expected.
    """
    try:
        frame = pd.read_csv(folder / file, dtype=str if file == "published.csv" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / file} cannot be read ({error}): restore it from the repository") from None
    expected, found = COLUMNS[file], tuple(frame.columns)
    if found != expected:
        wrong = sorted(set(found) ^ set(expected)) or list(found)
        raise UserError(
            f"{folder / file} has wrong columns ({', '.join(wrong)}): it needs exactly {', '.join(expected)}"
        )
    return frame


@functools.cache
def cells(table: int, folder: Path = DATA) -> dict[tuple[str, str], tuple[str, str]]:
    """(row, column) -> (value, std) of a printed table, as text; std is empty where none is printed."""
    frame = read("published.csv", folder)
    rows = frame[frame["table"] == str(table)].fillna("")
    return {(row.row, row.column): (row.value, row.std) for row in rows.itertuples()}  # type: ignore[misc]


def score_of(model: str, method: str, task: str, metric: str) -> tuple[float, int] | None:
    """The printed score in points and the number of its table; None where none is printed, or one by another metric."""
    if metric != METRICS.get(task, "accuracy"):
        return None
    rows = {ours: row for row, ours in METHODS.items()} | {"sparsegrad_authors": "SparseGrad"}
    columns = {ours: column for column, ours in TASKS.items()}
    for table, of in GLUE_MODELS.items():
        found = cells(table).get((rows.get(method, ""), columns.get(task, "")))
        if of == model and found is not None:
            return float(found[0]), table
    return None


def average_of_cells(table: int, row: str) -> float:
    """The mean of the task cells of a printed row."""
    values = [float(value) for (of, column), (value, _) in cells(table).items() if of == row and column in TASKS]
    return sum(values) / len(values)


def contradicts(table: int, row: str) -> str:
    """A remark for a printed average that is not the mean of its printed cells; empty where it is."""
    printed, real = cells(table)[row, "AVG"][0], average_of_cells(table, row)
    return f" [its cells average {real:.2f}]" if abs(float(printed) - real) > _rounding(printed) else ""


def _rounding(printed: str) -> float:
    """Largest difference that rounding explains: half a unit in the average, and half a unit in its cells.

    Cells have at most one decimal, so an average with more decimals is not more precise.
    """
    decimals = min(len(printed.partition(".")[2]), 1)
    return 1.01 * 0.1**decimals


def contradictions(table: int) -> list[str]:
    """One line for each printed average of a table that contradicts its cells."""
    rows = [row for row, column in cells(table) if column == "AVG"]
    return [
        f"{row} prints {cells(table)[row, 'AVG'][0]}, its cells average {average_of_cells(table, row):.2f}"
        for row in rows
        if contradicts(table, row)
    ]


def authors_runs(model: str, method: str, task: str, seeds: tuple[int, ...] = SEEDS) -> pd.DataFrame:
    """The authors' logged runs of one cell, with the paper's seeds or other `seeds`."""
    frame = read("authors_runs.csv")
    chosen = (frame["model"] == model) & (frame["method"] == method) & (frame["task"] == task)
    return frame[chosen & frame["seed"].isin(seeds)]
