"""What every table is made of, and how its cells are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.collect import Store

MINI_MARK = "mini: not the paper's model"
MISSING = "missing"


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


def signed(number: float | None) -> str:
    """A difference with its sign; empty for none."""
    return "" if number is None else f"{number:+.2f}"


def hours(number: float | None) -> str:
    """Hours to two digits; empty for none."""
    return "" if number is None else f"{number:.2f}"
