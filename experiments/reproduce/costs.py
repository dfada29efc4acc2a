"""Estimated hours of a run, from records of similar runs or else from the authors' logs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from experiments.paths import DATA
from experiments.report.collect import hours
from sparsegrad.device import pick_device
from sparsegrad.errors import UserError
from sparsegrad.runs.records import read_record

AUTHORS = DATA / "authors_runs.csv"
# Facts that similar runs share, from the closest match to the loosest: the length of a run depends on the task more
# than its speed on the method.
_LIKE = (
    ("experiment", "model", "method", "task"),
    ("model", "method", "task"),
    ("experiment", "model", "task"),
    ("model", "task"),
    ("experiment", "model", "method"),
    ("experiment", "model"),
    ("model", "method"),
    ("model",),
)
_THEIRS = (("model", "method", "task"), ("model", "task"), ("model",))


Rows = list[tuple[dict[str, str], float]]  # facts of a run, and its hours
RECORDS = "records"


class Estimates:
    """Estimates of hours: from records, those of this kind of device before others, or from the authors' logs."""

    def __init__(self, runs: Path) -> None:
        own = {True: Rows(), False: Rows()}
        here = pick_device("auto").type
        for record in _read_complete(runs):
            if (spent := hours(record)) is not None:
                kind = record.get("memory", {}).get("device", here)
                own[kind == here].append((facts_of(record["config"]), spent))
        self._rows = {RECORDS: own[True], "another device": own[False], "authors' GPU": list(_theirs())}

    def of(self, facts: Mapping[str, str]) -> tuple[float | None, str]:
        """(median hours or None, source or a dash) for a run with these `experiment`, `model`, `method` and `task`."""
        for source, rows in self._rows.items():
            likes = _THEIRS if source == "authors' GPU" else _LIKE
            for like in likes:  # the first definition of "similar" that any run meets
                found = [spent for row, spent in rows if all(row[name] == facts[name] for name in like)]
                if found:
                    return median(found), source
        return None, "-"


def _read_complete(runs: Path) -> Iterable[Mapping[str, Any]]:
    for path in sorted(runs.rglob("*.json")):
        try:
            record = read_record(path)
        except UserError:
            continue  # the report lists damaged records
        if record.get("status") == "complete":
            yield record


def facts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The facts that `Estimates` compares, from a resolved configuration."""
    names = {group: str(config[group]["name"]) for group in ("model", "method", "task")}
    return {"experiment": str(config["name"]), **names}


def _theirs() -> Iterable[tuple[dict[str, str], float]]:
    with AUTHORS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["hours"]:
                yield row, float(row["hours"])
