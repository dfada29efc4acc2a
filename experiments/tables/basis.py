"""The basis study: energy in the largest 1 % for each basis, and the score that two of them reach."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from experiments.stats import summarise, welch_interval
from experiments.tables.accuracy import AVERAGE, Grid
from experiments.tables.base import MINI_MARK, MISSING, Context, Table
from sparsegrad.errors import UserError

TASKS = ("stsb", "mrpc")
NAMES = {
    "none": "no rotation",
    "in-side": "in-side only",
    "out-side": "out-side only",
    "both": "both sides (HOSVD)",
    "authors": "the authors' (V^T G U^T)",
    "random": "random",
}
DENSITY = 0.01


def read(results: Path) -> dict[str, Any] | None:
    """What `python -m experiments.measure basis` left, or None.

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


def table(context: Context) -> Table:
    """Per basis: energy by kind, averaged over the steps measured, and score where it was trained."""
    found = read(context.results)
    grid = Grid(context, "mini_basis", "minilm", "paper", TASKS)
    rows = []
    for basis, name in NAMES.items():
        row = {"basis": name}
        for kind in ("intermediate", "output"):
            row[f"energy, {kind}"] = MISSING if found is None else f"{mean(energy(found, basis, kind).values()):.3f}"
        for task in (*TASKS, AVERAGE):
            row[task] = str(
                summarise(grid.values(basis, task)) or ("" if basis not in ("both", "authors") else MISSING)
            )
        rows.append(row)
    notes = ["Energy: share of the squared norm in the largest 1 % of entries, mean over blocks and training steps.",
             "Scores in points, mean ± sample std over seeds; only these two bases are trained here."]  # fmt: skip
    interval = welch_interval(grid.values("both", AVERAGE), grid.values("authors", AVERAGE))
    if interval is not None:
        notes.append(f"HOSVD minus the authors' basis, average: {interval[0]:+.2f} to {interval[1]:+.2f} (95 % Welch).")
    records = {f"basis {label}": paths for label, paths in grid.records(["both", "authors"])}
    return Table("basis_study", f"Basis study ({MINI_MARK})", pd.DataFrame(rows), notes, records)
