"""`DRY=1`: which cells of a table are complete, failed or missing, and the hours of the rest. The totals come first."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.reproduce.cells import Cell
from experiments.reproduce.costs import Estimates, facts_of
from sparsegrad.cli.text_table import Column, fit, render

# Columns that a narrow terminal can go without, the first one soonest.
_SPARE = ("estimated from", "model", "failed")


def state(cell: Cell) -> str:
    """`complete`, `failed`, `missing`, or `waits` for a search; `again`: a complete record that is to be replaced."""
    if cell.waits is not None:
        return "waits"
    record = cell.record()
    if record is None:
        return "missing"
    return "again" if cell.is_again and record["status"] == "complete" else str(record["status"])


def show(cells: Sequence[Cell], runs: Path | None = None) -> None:
    """Print the total hours, then one line per model, method and task; `runs` has the records of similar runs."""
    estimates = Estimates(runs or Path(cells[0].config.results_dir) / "runs")
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        facts = facts_of(cell.config.resolved)
        groups.setdefault((facts["model"], facts["method"], facts["task"]), []).append(cell)
    rows, done, total, unknown = [], 0, 0.0, 0
    for names, group in groups.items():
        counts = Counter(map(state, group))
        left = len(group) - counts["complete"]
        per_run, source = estimates.of(facts_of(group[0].config.resolved))
        done, total = done + counts["complete"], total + left * (per_run or 0.0)
        unknown += left if per_run is None else 0
        row = dict(zip(("model", "method", "task"), names, strict=True))
        row |= {name: str(counts[name]) for name in ("complete", "again", "failed", "missing", "waits")}
        rows.append({**row, "hours left": format_left(left, per_run), "estimated from": source if left else "-"})
    absent = [name for name in ("again", "waits") if all(row[name] == "0" for row in rows)]  # so in most listings
    rows = [{name: text for name, text in row.items() if name not in absent} for row in rows]
    print_listing(
        f"{done} of {len(cells)} cells complete; about {total:.1f} hours left, one run at a time"
        + (f"; {unknown} runs of unknown cost" if unknown else ""),
        rows,
    )


def format_left(left: int, each: float | None, digits: int = 2) -> str:
    """What is left at `each` per run; `?` where that is unknown, a dash where nothing is left."""
    return "-" if not left else "?" if each is None else f"{left * each:.{digits}f}"


def print_listing(total: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print the total, what all rows share, and a line per row that fits the terminal; a pipe gets all columns."""
    print(total)
    if not rows:
        return
    shared = {name: value for name, value in rows[0].items() if all(row[name] == value for row in rows)}
    shared = {} if len(rows) == 1 else shared
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if shared:
        text = "each row: " + ", ".join(f"{name} {value}" for name, value in shared.items())
        print(textwrap.fill(text, width) if width else text)
    ranks = {name: len(_SPARE) - number for number, name in enumerate(_SPARE)}
    names = [name for name in rows[0] if name not in shared]
    columns = [Column(name.replace(" ", "\n"), [row[name] for row in rows], ranks.get(name, 0)) for name in names]
    print(render(fit(columns, width)[0]))
