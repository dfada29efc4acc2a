"""Files of a plan that an earlier report wrote, and that today's records no longer give."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from experiments.report.blocks import BLOCKS
from experiments.report.comparison.figure import PICTURES
from experiments.report.comparison.notes import PLANS
from experiments.report.render import SUFFIXES
from experiments.report.tables.base import Table

PLANNED: dict[str, Collection[str]] = {"tables": BLOCKS, "compare": PLANS}  # folder -> plans whose files are in it
PARTS = ("", "_tasks", "_exact", "_orders")  # a plan's tables: their names after that of the plan


def remove_stale(results: Path, tables: Iterable[Table], pictures: Iterable[Path]) -> None:
    """Delete the tables and figures of plans that are not among those just written.

    They would show scores that no longer count, for example after a plan was edited. Other files are left alone, also
    those of a user whose names merely begin with a plan's.
    """
    written = {(table.folder, table.name, suffix) for table in tables for suffix in SUFFIXES}
    written |= {(path.parent.name, path.stem, suffix) for path in pictures for suffix in PICTURES}
    for folder, plans in PLANNED.items():
        names = {f"{plan}{part}" for plan in plans for part in PARTS}
        for path in (results / folder).glob("*"):
            is_generated = path.suffix in (*SUFFIXES, *PICTURES) and path.stem in names
            if is_generated and (folder, path.stem, path.suffix) not in written:
                path.unlink()
