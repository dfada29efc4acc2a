"""The share of a gradient that each engine captures, from `python -m experiments.studies.gradients energy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import pandas as pd

from experiments.report.figure_data import read_figure_data
from experiments.report.tables.base import MINI_MARK, MISSING, Context, Table

# Names of the arms in energy.json -> names here.
CAPTURED = {
    "exact, both sides": "exact",
    "small side": "exact, small side only",
    "block, proportional": "fast, block proportional to the weight",
    "block, inputs alone": "fast, block over the inputs alone",
}


def table(context: Context) -> Table:
    """Share of the gradient that each engine captures, by layer kind, at the first and last measured step.

    Raises:
        UserError: when the measurement cannot be read.
    """
    found = read_figure_data(context.results, "energy")
    rows = [] if found is None else found["rows"]
    steps = sorted({row["step"] for row in rows})
    lines = [_shares(rows, arm, steps) for arm in dict.fromkeys(row["arm"] for row in rows)]
    notes = [
        "Share of the squared norm of an MLP weight's gradient in the 1 % of entries that an engine trains (the "
        "largest 1 % after rotation, or a leading block), averaged over blocks. `all`: mean over the measured steps.",
        "A larger share does not imply better training.",
        *([f"Task: {found['task']}."] if found and "task" in found else []),
    ]
    if not rows:
        notes, lines = (
            [f"{MISSING}: measure it with `python -m experiments.studies.gradients energy`"],
            [{"arm": MISSING}],
        )
    return Table("quality_energy", f"Gradient captured by each engine ({MINI_MARK})", pd.DataFrame(lines), notes)


def _shares(rows: Sequence[Mapping[str, Any]], arm: str, steps: Sequence[int]) -> dict[str, str]:
    of = {(row["kind"], row["step"]): mean(row["blocks"]) for row in rows if row["arm"] == arm}
    line = {"arm": CAPTURED.get(arm, arm)}
    for kind in dict.fromkeys(kind for kind, _ in of):
        line |= {f"{kind}, step {step}": f"{of[kind, step]:.3f}" for step in dict.fromkeys((steps[0], steps[-1]))}
        line[f"{kind}, all"] = f"{mean(of[kind, step] for step in steps):.3f}"
    return line
