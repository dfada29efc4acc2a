"""The basis study: gradient energy in the largest 1 % of entries for each basis, and scores of two of them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from experiments.report.tables.accuracy import AVERAGE, COLLAPSED, Grid
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table
from sparsegrad.errors import UserError

TASKS = ("stsb", "mrpc")
NAMES = {
    "none": "no rotation",
    "in-side": "in-side only",
    "out-side": "out-side only",
    "both": "both sides (HOSVD)",
    "authors": "authors' code (V^T G U^T)",
    "random": "random",
}
TRAINED = HOSVD, AUTHORS = ("both", "authors")
DENSITY = 0.01


def read(results: Path) -> dict[str, Any] | None:
    """The data that `python -m experiments.studies.gradients basis` measured, or None.

    Raises:
        UserError: when it cannot be read.
    """
    path = results / "figures" / "basis.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make reproduce-basis measures it again") from None


def energy(found: dict[str, Any], basis: str, kind: str, density: float = DENSITY) -> dict[int, float]:
    """Step -> mean over blocks of the energy in the largest entries."""
    rows = [row for row in found["rows"] if (row["basis"], row["kind"], row["density"]) == (basis, kind, density)]
    return {row["step"]: mean(row["blocks"]) for row in rows}


def differences(context: Context) -> list[str]:
    """Intervals of the score with HOSVD minus that with the authors' basis, as a note."""
    said = _grid(context).differences(HOSVD, AUTHORS)
    return [f"HOSVD minus the authors' basis, 95 % Welch intervals: {said}."] if said else []


def _grid(context: Context) -> Grid:
    return Grid(context, "mini_basis", "minilm", "paper", TASKS)


def table(context: Context) -> Table:
    """One row per basis: energy by layer kind, averaged over the measured steps, and scores if it was trained."""
    found = read(context.results)
    grid = _grid(context)
    rows = []
    for basis, name in NAMES.items():
        row = {"basis": name}
        for kind in ("intermediate", "output"):
            row[f"energy, {kind}"] = MISSING if found is None else f"{mean(energy(found, basis, kind).values()):.3f}"
        for task in (*TASKS, AVERAGE):
            line = grid.line(basis, task)
            row[task], row[f"n, {task}"] = (line["ours"], line["n"]) if basis in TRAINED else ("", "")
        rows.append(row)
    notes = [
        "Energy: share of the squared norm in the largest 1 % of entries, averaged over blocks and training steps.",
        "Scores in points, mean ± sample std over seeds, protocol paper. Only two bases were trained, both at the "
        "learning "
        "rate that the grid search chose for the authors' variant. " + COLLAPSED,
        *differences(context),
    ]
    records = {f"basis {label}": paths for label, paths in grid.records(TRAINED)}
    return Table("basis_study", f"Basis study ({MINI_MARK})", pd.DataFrame(rows), notes, records)
