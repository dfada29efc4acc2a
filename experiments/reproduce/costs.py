"""Estimated hours of a run, from records of similar runs or else from the authors' logs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from experiments.paths import DATA
from experiments.report.collect import hours
from sparsegrad.errors import UserError
from sparsegrad.runs.records import read_record

AUTHORS = DATA / "authors_runs.csv"
# Facts that similar runs share, from the closest match to the loosest.
_LIKE = (
    ("experiment", "model", "method", "task"),
    ("experiment", "model", "method"),
    ("experiment", "model"),
    ("model", "method", "task"),
    ("model", "task"),  # the length of a run depends on the task more than its speed on the method
    ("model", "method"),
    ("model",),
)
_THEIRS = (("model", "method", "task"), ("model", "task"), ("model",))


class Estimates:
    """Estimates of hours, from all records below a folder and from the authors' logs."""

    def __init__(self, runs: Path) -> None:
        self._rows = list(_own(runs)), list(_theirs())

    def of(self, facts: Mapping[str, str]) -> tuple[float | None, str]:
        """(median hours or None, source or a dash) for a run with these `experiment`, `model`, `method` and `task`."""
        sources = ("records", "authors' GPU")
        for rows, likes, source in zip(self._rows, (_LIKE, _THEIRS), sources, strict=True):
            for like in likes:  # the first definition of "similar" that any run meets
                found = [spent for row, spent in rows if all(row[name] == facts[name] for name in like)]
                if found:
                    return median(found), source
        return None, "-"


def _own(runs: Path) -> Iterable[tuple[dict[str, str], float]]:
    for path in sorted(runs.rglob("*.json")):
        try:
            record = read_record(path)
        except UserError:
            continue  # the report lists damaged records
        spent = hours(record)
        if spent is not None and record.get("status") == "complete":
            yield facts_of(record["config"]), spent


def facts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The facts that `Estimates` compares, from a resolved configuration."""
    names = {group: str(config[group]["name"]) for group in ("model", "method", "task")}
    return {"experiment": str(config["name"]), **names}


def _theirs() -> Iterable[tuple[dict[str, str], float]]:
    with AUTHORS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["hours"]:
                yield row, float(row["hours"])
