"""What README.md and docs/ quote, and the committed tables that it comes from."""

from __future__ import annotations

import functools
import re
from typing import NoReturn

import pandas as pd
import pytest

from experiments.paths import ROOT

README, EVIDENCE, CHOOSING = "README.md", "docs/evidence.md", "docs/choosing.md"
TASKS = ("stsb", "mrpc", "sst2", "cola")  # of evidence_paper


@functools.cache
def table(name: str) -> pd.DataFrame:
    """A committed table, which test_experiments_report.py holds equal to that of the committed records."""
    frame = pd.read_csv(ROOT / "results" / "tables" / f"{name}.csv", dtype=str, keep_default_na=False)
    return frame.set_index(frame.columns[0])


def cell(name: str, row: str, column: str) -> str:
    """The text of a cell of a committed table."""
    frame = table(name)
    return str(frame.loc[row, column]) if row in frame.index and column in frame.columns else missing(name, row, column)


def missing(name: str, row: str, column: str) -> NoReturn:
    """Fail where a page quotes a figure that its table no longer has."""
    pytest.fail(
        f"results/tables/{name}.csv has no figure in row {row!r}, column {column!r}, which README.md or docs/ quote: "
        "a task or method is no longer compared, so rewrite the passage and this test"
    )


@functools.cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def rows_below(page: str, header: str) -> list[str]:
    """The rows of the table whose first line begins with `header`."""
    assert header in read(page), f"{page} has no table that begins with {header!r}: give its new beginning in this test"
    lines = read(page).split(header, 1)[1].splitlines()[2:]
    return lines[: next(place for place, line in enumerate(lines) if not line.startswith("|"))]


def passage(page: str, start: str) -> str:
    """The paragraph, bullet or row that begins with `start`."""
    assert start in read(page), f"{page} has no passage that begins with {start!r}: give its new beginning in this test"
    return re.split(r"\n(?=\n|- |\||#)", read(page).split(start, 1)[1])[0]
