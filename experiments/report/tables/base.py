"""What every table is made of, and how its cells are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.report.collect import Store

MINI_MARK = "mini: not the paper's model"
SCALED = "(scaled)"  # of a benchmark's model that was cut to fewer blocks
MISSING = "missing"
OURS = ("ours", "found here", "energy")  # how the columns that our runs fill begin
LABELLED = ("model", "method", "kept", "task", "protocol")  # columns whose cells name a cell of `records`


@dataclass(frozen=True)
class Context:
    """What tables are made from.

    Attributes:
        results: the results folder.
        store: its records.
        scale: paper or mini.
    """

    results: Path
    store: Store
    scale: str


@dataclass
class Table:
    """One finished table.

    Attributes:
        name: its file name, such as table4 or table4_mini.
        title: what it shows.
        frame: its cells, as text.
        notes: lines below it.
        records: label of a cell -> its records, relative to results/runs.
    """

    name: str
    title: str
    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    records: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def cells(self) -> list[tuple[str, bool]]:
        """Every cell that runs of ours fill or would, and whether it is of another model than the paper's.

        A benchmark's column tells by its heading that the model was cut, a row by its model that it is a small one.
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
        """(measured, all) of the cells that ours fill: (0, 0) for a table that needs no runs, or lacks none."""
        cells = [cell for cell, _ in self.cells]
        return sum(map(is_measured, cells)), len(cells)

    @property
    def is_bare(self) -> bool:
        """Whether nothing of ours is in it."""
        measured, cells = self.coverage
        return cells > 0 and measured == 0

    def label_of(self, row: Mapping[str, str]) -> str:
        """How `records` calls the cell of a row."""
        return " ".join(row[name] for name in LABELLED if name in row)


def is_measured(cell: str) -> bool:
    """Whether a cell of ours holds a figure."""
    return cell != MISSING and not cell.startswith("failed")


def signed(number: float | None) -> str:
    """A difference with its sign; empty for none."""
    return "" if number is None else f"{number:+.2f}"


def interval_text(interval: tuple[float, float] | None) -> str:
    """Both ends of a difference's interval, signed; empty for none."""
    return "" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def hours(number: float | None) -> str:
    """Hours to two digits; empty for none."""
    return "" if number is None else f"{number:.2f}"


def caveat(results_dir: Path) -> str:
    """What the choice in `mini_rates.json` rests on, and the methods whose best rate is at the edge of the grid."""
    try:
        chosen = json.loads((results_dir / "mini_rates.json").read_text())["methods"]
    except FileNotFoundError:
        return ""
    edges = [f"{method} {one['lr']:g}" for method, one in chosen.items() if one["at_edge"]]
    said = "one seed and two tasks, so another seed may choose otherwise (docs/performance.md, Quality)" + (
        f"; at an edge of the grid, so perhaps not the best: {', '.join(edges)}" * bool(edges)
    )
    return f"Learning rate of each method: results/mini_rates.json, chosen on held-out rows, {said}."
