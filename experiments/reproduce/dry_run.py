"""`DRY=1`: list which cells of a table are complete, failed or missing, and estimate the hours of the rest."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.reproduce.cells import Cell
from experiments.reproduce.costs import Estimates, facts_of

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # in a pipe rich would use 80


def state(cell: Cell) -> str:
    """`complete`, `failed` or `missing`."""
    record = cell.record()
    return "missing" if record is None else str(record["status"])


def show(cells: Sequence[Cell]) -> None:
    """Print one line per model, method and task, and the total hours."""
    estimates = Estimates(Path(cells[0].config.results_dir) / "runs")
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        facts = facts_of(cell.config.resolved)
        groups.setdefault((facts["model"], facts["method"], facts["task"]), []).append(cell)
    table = Table("model", "method", "task", "complete", "failed", "missing", "hours left", "estimated from")
    total, unknown = 0.0, 0
    for names, group in groups.items():
        counts = Counter(map(state, group))
        left = len(group) - counts["complete"]
        per_run, source = estimates.of(facts_of(group[0].config.resolved))
        total, unknown = total + left * (per_run or 0.0), unknown + (left if per_run is None else 0)
        hours = "" if not left else "?" if per_run is None else f"{left * per_run:.2f}"
        numbers = (counts[name] for name in ("complete", "failed", "missing"))
        table.add_row(*names, *map(str, numbers), hours, source if left else "")
    console.print(table)
    done = sum(state(cell) == "complete" for cell in cells)
    console.print(f"{done} of {len(cells)} cells complete; about {total:.1f} hours left, one run at a time", end="")
    console.print(f"; {unknown} runs of unknown cost" if unknown else "")
