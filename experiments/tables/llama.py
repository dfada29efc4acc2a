"""Table 6: LLaMA-2-7B on OASST1; what is published, and what of ours is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.collect import Run
from experiments.published import METHODS, cells
from experiments.stats import summarise
from experiments.tables.base import MINI_MARK, MISSING, Context, Table, hours

TASK = "oasst1"
PAPER_MODEL = "llama2_7b"


def table(context: Context) -> Table:
    """Published cells, and the validation loss of our runs of any model on OASST1, by model."""
    rows = [_published(row, method) for row, method in METHODS.items()]
    records: dict[str, list[Path]] = {}
    for (folder, model, method, task, protocol), runs in sorted(context.store.runs.items()):
        if task == TASK:
            rows.append(_ours(model, method, runs, context))
            records[f"{model} {method} {protocol} {folder}"] = [run.path for run in runs]
    notes = [
        "Our rows: loss on the validation split, by model; models other than LLaMA-2-7B are not the paper's model."
    ]
    if not records:
        notes.append("Missing: runs of task oasst1 (LLaMA-2-7B needs its weights and a GPU of 80 GB) and the judge.")
    return Table("table6", "Table 6: LLaMA-2-7B on OASST1", pd.DataFrame(rows), notes, records)


def _published(row: str, method: str) -> dict[str, str]:
    found = cells(6)
    loss, std = found[row, "Valid Loss"]
    return {
        "model": PAPER_MODEL,
        "method": method,
        "published loss": f"{loss} ± {std}",
        "published I-Bench": found[row, "I-Bench Score"][0],
        "published trainable": found[row, "#Train params"][0],
        "ours, loss": MISSING,
        "n": "0",
        "hours": "",
    }


def _ours(model: str, method: str, runs: list[Run], context: Context) -> dict[str, str]:
    losses = [loss for run in runs if (loss := _loss(context.store.records[run.path])) is not None]
    found, spent = summarise(losses), [run.hours for run in runs if run.hours is not None]
    blank = dict.fromkeys(("published loss", "published I-Bench", "published trainable"), "none")
    shown = MISSING if found is None else f"{found.mean:.3f}" + ("" if found.std is None else f" ± {found.std:.3f}")
    measured = {"ours, loss": shown, "n": str(len(losses)), "hours": hours(sum(spent) if spent else None)}
    mark = "" if model == PAPER_MODEL else f" ({MINI_MARK})"
    return {"model": model + mark, "method": method, **blank, **measured}


def _loss(record: dict[str, Any]) -> float | None:
    """The validation loss of the chosen checkpoint: the mean negative log-likelihood per token."""
    result = record["result"] if record["status"] == "complete" else {}
    return float(result["value"]) if result.get("metric") == "nll" else None
