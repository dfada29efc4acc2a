"""The common form of all tables, and the format of their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.report.collect import Store

MINI_MARK = "mini: not the paper's model"
SCALED = "(scaled)"  # marks a benchmark of a model cut to fewer blocks
MISSING = "missing"
OURS = ("ours", "found here", "energy")  # prefixes of columns that our runs fill
SHOWN = 5  # records that do not count are listed up to this number
LABELLED = ("model", "method", "kept", "task", "protocol")  # columns that make up the label of a cell in `records`


@dataclass(frozen=True)
class Context:
    """The input of every table.

    Attributes:
        results: the results folder.
        store: its records.
        scale: `paper` or `mini`.
    """

    results: Path
    store: Store
    scale: str


@dataclass
class Table:
    """One finished table.

    Attributes:
        name: file name, such as table4 or evidence_paper.
        title: heading.
        frame: cells as text.
        notes: lines below the table.
        records: label of a cell -> its records, relative to results/runs.
        folder: that of its files, below the results folder.
    """

    name: str
    title: str
    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    records: dict[str, list[Path]] = field(default_factory=dict)
    folder: str = "tables"

    @property
    def cells(self) -> list[tuple[str, bool]]:
        """(text, whether it is of another model than the paper's) of every cell that our runs fill.

        A column's heading tells that a benchmark's model was cut; a row or the title tells that the model is small.
        """
        mine = [name for name in self.frame.columns if name.startswith(OURS) or (self.frame[name] == MISSING).any()]
        small = [MINI_MARK in f"{self.title} {' '.join(map(str, row))}" for row in self.frame.to_numpy()]
        return [
            (str(cell), is_small or SCALED in name)
            for name in mine
            for cell, is_small in zip(self.frame[name], small, strict=True)
            if str(cell)
        ]

    @property
    def coverage(self) -> tuple[int, int]:
        """(measured, all) numbers of the cells that our runs fill; (0, 0) for a table that needs no runs."""
        cells = [cell for cell, _ in self.cells]
        return sum(map(is_measured, cells)), len(cells)

    @property
    def is_bare(self) -> bool:
        """Whether the table has cells for our runs, none of them measured."""
        measured, cells = self.coverage
        return cells > 0 and measured == 0

    def label_of(self, row: Mapping[str, str]) -> str:
        """The label in `records` of the cell in a row."""
        return " ".join(row[name] for name in LABELLED if name in row)


def is_measured(cell: str) -> bool:
    """Whether a cell contains a measured value."""
    return cell != MISSING and not cell.startswith("failed")


def list_apart(lines: Sequence[str]) -> list[str]:
    """Notes on the records that do not count: the first ones, and the number of the others."""
    notes = [f"Not counted: {line}." for line in lines[:SHOWN]]
    more = len(lines) - SHOWN
    return [*notes, f"Not counted: {more} more records for such reasons."] if more > 0 else notes


def signed(number: float | None) -> str:
    """A difference with its sign; empty for None."""
    return "" if number is None else f"{number:+.2f}"


def interval_text(interval: tuple[float, float] | None, digits: int = 2) -> str:
    """Both ends of an interval with their signs; empty for None."""
    return "" if interval is None else " to ".join(f"{end:+.{digits}f}" for end in interval)


def hours(number: float | None) -> str:
    """Hours with two decimals; empty for None."""
    return "" if number is None else f"{number:.2f}"
