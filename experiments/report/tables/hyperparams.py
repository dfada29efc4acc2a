"""Tables 13-15: best batch size and learning rate per task, with the rows of `make sweep-table`.

Results of a study come from its storage or, if that is not available, from its summary in results/studies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.report.tables.base import MISSING, Context, Table
from experiments.report.tables.searched import HEADER, rows
from sparsegrad.files import read_json
from sparsegrad.sweeps.storage import open_store

TIE = 1e-9
FOUND, SCORE, STUDY = (HEADER.index(name) for name in ("found here", "score", "study"))


def tables(context: Context) -> list[Table]:
    """Tables 13, 14 and 15, and one table for all other searches."""
    storage = context.results / "studies" / "studies.db"
    found = summaries(context.results)
    lines = [_fill_row(line, found) for line in rows(open_store(str(storage)) if storage.is_file() else None)]
    printed = {number: [line[1:] for line in lines if line[0] == str(number)] for number in (13, 14, 15)}
    own = [one for one in found if _names(one) not in {tuple(line[1:4]) for line in lines if line[0]}]
    return [*(_table(number, of) for number, of in printed.items()), _searches_table(own, context.results / "studies")]


def summaries(results: Path) -> list[dict[str, Any]]:
    """The readable summaries of studies, which `python -m sparsegrad.sweeps show` writes."""
    return [one for _, one in _read(results) if isinstance(one, dict)]


def unread(results: Path) -> list[str]:
    """One line for each damaged summary."""
    return [f"studies/{path.parent.name}/{path.name}: {one}" for path, one in _read(results) if isinstance(one, str)]


def _read(results: Path) -> list[tuple[Path, dict[str, Any] | str]]:
    return [(path, _summary(path)) for path in sorted((results / "studies").glob("*/summary.json"))]


def _summary(path: Path) -> dict[str, Any] | str:
    """The content of a summary, or the reason why it cannot be used."""
    try:
        found: dict[str, Any] = read_json(path)
        _check_fields(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"not a readable summary ({type(error).__name__})"
    return dict(found)


def _check_fields(found: Mapping[str, Any]) -> None:
    """Raise a built-in error for a field that is missing or of another type than the tables expect."""
    best, trials = found["best"], found["trials"]
    numbers = [best["value"], trials["complete"], trials.get("pruned", 0), found.get("seconds", 0.0)]
    texts = [found["study"], found["metric"], found["objective"], *(found.get("labels") or {}).values()]
    numbers += [value for key, value in best["values"].items() if key in ("train.batch_size", "train.lr")]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        raise TypeError
    if not all(isinstance(one, str) for one in texts):
        raise TypeError


def _names(summary: dict[str, Any]) -> tuple[str, ...]:
    labels = summary.get("labels") or {}
    return tuple(labels.get(name, "") for name in ("model", "method", "task"))


def _fill_row(line: list[str], found: list[dict[str, Any]]) -> list[str]:
    """A row, filled from the largest summary of its model, method and task if the storage has no study of them."""
    like = [one for one in found if _names(one) == tuple(line[1:4])]
    if line[FOUND] or not like:
        return [*line[:FOUND], line[FOUND] or MISSING, *line[SCORE:]]
    one = max(like, key=lambda each: int(each["trials"]["complete"]))
    return [*line[:FOUND], _pair(one["best"]["values"]), f"{one['best']['value']:.4f}", str(one["study"])]


def equals(study: Path, best: float) -> str:
    """Batch size / learning rate of each further complete trial with the best score."""
    path = study / "trials.csv"
    frame = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["state", "value"])
    same = frame[(frame["state"] == "complete") & ((frame["value"] - best).abs() < TIE)]
    return ", ".join(_pair(dict(row)) for _, row in same.iloc[1:].iterrows())


def _pair(values: Mapping[str, Any]) -> str:
    batch, rate = values.get("train.batch_size"), values.get("train.lr")
    return f"{'' if batch is None else batch} / {'' if rate is None else f'{rate:.2e}'}"


def _table(number: int, lines: list[list[str]]) -> Table:
    title = f"Table {number}: batch size / learning rate, {lines[0][0]}, {lines[0][1]}"
    notes = [
        "The paper's captions are wrong. The authors' runs show that Table 14 is full fine-tuning of BERT, and Table "
        "15 of RoBERTa-base."
    ]
    if all(line[FOUND - 1] == MISSING for line in lines):
        notes.append(
            f"Found here: missing; `make reproduce-table{number}` searches, with DRY=1 it estimates the hours."
        )
    return Table(f"table{number}", title, pd.DataFrame(lines, columns=list(HEADER[1:])), notes)


def _searches_table(found: list[dict[str, Any]], studies: Path) -> Table:
    """Searches on other models than the paper's."""
    names = ["study", "batch size / learning rate", "as good", "score", "objective", "trials complete", "pruned"]
    lines = []
    for one in found:
        score, trials = f"{one['best']['value']:.4f} {one['metric']}", one["trials"]
        best, counts = one["best"], (str(trials["complete"]), str(trials.get("pruned", 0)))
        also = equals(studies / str(one["study"]), float(best["value"]))
        lines.append([one["study"], _pair(best["values"]), also, score, one["objective"], *counts])
    frame = pd.DataFrame(lines, columns=names)
    notes = [
        "The first trial with the best score, one seed per trial. As good: other trials with the same score. A small "
        "held-out part often has ties, so a search finds a range of learning rates, not a single one.",
    ]
    return Table("table13_mini", "Tables 13 to 15 on MiniLM: our searches (mini: not the paper's model)", frame, notes)
