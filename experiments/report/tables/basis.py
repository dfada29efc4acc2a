"""The basis study: gradient energy in the largest 1 % of entries for each basis."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from experiments.report.figure_data import read_figure_data
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table

NAMES = {
    "none": "no rotation",
    "in-side": "in-side only",
    "out-side": "out-side only",
    "both": "both sides (HOSVD)",
    "authors": "authors' code (V^T G U^T)",
    "random": "random",
}
DENSITY = 0.01


def read(results: Path) -> dict[str, Any] | None:
    """The data that `python -m experiments.studies.gradients basis` measured, or None.

    Raises:
        UserError: when it cannot be read.
    """
    return read_figure_data(results, "basis")


def kept_energy(found: dict[str, Any], basis: str, kind: str) -> dict[int, float]:
    """Step -> mean over blocks of the energy in the largest 1 % of entries."""
    rows = [row for row in found["rows"] if (row["basis"], row["kind"], row["density"]) == (basis, kind, DENSITY)]
    return {row["step"]: mean(row["blocks"]) for row in rows}


def table(context: Context) -> Table:
    """One row per basis: energy by layer kind, averaged over the measured steps."""
    found = read(context.results)
    rows = []
    for basis, name in NAMES.items():
        row = {"basis": name}
        for kind in ("intermediate", "output"):
            row[f"energy, {kind}"] = (
                MISSING if found is None else f"{mean(kept_energy(found, basis, kind).values()):.3f}"
            )
        rows.append(row)
    notes = [
        "Energy: share of the squared norm in the largest 1 % of entries, averaged over blocks and training steps.",
    ]
    return Table("basis_study", f"Basis study: energy of the gradient ({MINI_MARK})", pd.DataFrame(rows), notes)
