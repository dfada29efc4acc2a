"""The record: the JSON file that one run writes. Reading, checking, and turning records into a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad.errors import UserError
from sparsegrad.files import load_json, unreadable

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
PRUNED = "pruned by the sweep"  # start of the reason of a trial that its sweep stopped, which is not a failure
RUNS = "runs"  # the folder of records in a results folder
_BESIDE_RUNS = (RUNS, "work", "models", "adapters", "studies")  # folders of a results folder that hold no other
ENGINE_NAMES = {"merged": "exact"}  # earlier names of engines, in records made before they changed


def read_record(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        UserError: when it is damaged, has another schema, or lacks a field that tables need.
        ResourceError: when the disk does not let it be read.
    """
    try:
        record = load_json(path)
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise UserError(f"{path} is not a readable record ({error}): delete it and run again") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not isinstance(record, dict) or "schema" not in record:
        raise UserError(f"{path} is not a record, as it has no schema: give a folder of records, or move it elsewhere")
    if record["schema"] != SCHEMA:
        found = record["schema"]
        raise UserError(f"{path} has record schema {found}, this version reads {SCHEMA}: delete it and run again")
    if wrong := _wrong_field(record):
        raise UserError(f"{path} is not a readable record ({wrong}): delete it and run again")
    return record


def _wrong_field(record: Mapping[str, Any]) -> str | None:
    """The first field of `summary` with a value of the wrong type; None if there is none."""
    try:
        row = summary(record)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"
    # A score may be missing (Pearson of a constant prediction is undefined), but its name is always there.
    always = (*_ALWAYS, "metric") if row["status"] == "complete" and "result" in record else _ALWAYS
    for name, value in row.items():
        optional = name not in always
        if not (isinstance(value, _KINDS[name]) or (optional and value is None)):
            return f"{name} is a {type(value).__name__}"
    counts = (row["per_weight"] or {}).values()
    return None if all(isinstance(count, int) for count in counts) else "per_weight holds other than counts"


def find_complete(path: Path) -> dict[str, Any] | None:
    """The record at `path` if its run is complete, else None."""
    if not path.exists():
        return None
    record = read_record(path)
    return record if record["status"] == "complete" else None


def run_seconds(record: Mapping[str, Any]) -> float | None:
    """Wall-clock seconds of a run, with those of the processes that it continued; None if they are unknown.

    Records of earlier versions have the times of the last process only.
    """
    environment = record.get("environment", {})
    try:
        if "seconds" in environment:
            return None if environment["seconds"] is None else float(environment["seconds"])
        started, finished = (datetime.fromisoformat(environment[name]) for name in ("started", "finished"))
    except (KeyError, TypeError, ValueError):
        return None
    return (finished - started).total_seconds()


def load_records(folder: Path | str, on_bad: Callable[[UserError], None] | None = None) -> pd.DataFrame:
    """All records below `folder`, one row each, sorted by path: the fields that tables need, and `path`.

    `find_records` says which files these are.

    Raises:
        UserError: for a damaged record, or another JSON file among the records, unless `on_bad` takes it.
    """
    import pandas as pd  # here: the benchmark writes its results on machines without it

    rows = []
    for path in find_records(Path(folder)):
        try:
            rows.append({"path": str(path), **summary(read_record(path))})
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return pd.DataFrame(rows)


def find_records(folder: Path) -> list[Path]:
    """The files of all records below `folder`, sorted: the JSON files in `runs` of each results folder.

    Other JSON files are beside `runs`, of studies, models and adapters, and work folders hold those of trackers. A
    record outside `runs`, such as a copy, is found in `folder` itself, and below it if there is no `runs` at all.
    """
    places = _find_places(folder)
    found = {path for place in places for path in place.rglob("*.json")}
    outside = set(folder.glob("*.json") if places else folder.rglob("*.json")) - found
    return sorted(found | {path for path in outside if not _is_other(path)})


def _find_places(folder: Path) -> list[Path]:
    """The folders `runs` of all results folders below `folder`, such as outputs/quickstart; or it is part of one."""
    found: list[Path] = []
    if folder.resolve().name == RUNS:  # a run may be called `runs` as well
        return [folder]
    for name, folders, _ in os.walk(folder):
        is_results = RUNS in folders
        found += [Path(name, RUNS)] if is_results else []
        skipped = _BESIDE_RUNS if is_results else ()
        folders[:] = [one for one in folders if one not in skipped and not one.startswith(".")]
    return found or ([folder] if folder.resolve().parent.name == RUNS else [])


def _is_other(path: Path) -> bool:
    """Whether a JSON file is of something else than a run; a damaged one may be a record."""
    try:
        content = load_json(path)
    except (OSError, ValueError):
        return False
    return not isinstance(content, dict) or "schema" not in content


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that tables show, flat."""
    config, memory = record["config"], record.get("memory", {})
    return {
        "status": record["status"],
        "model": config["model"]["name"],
        "method": config["method"]["name"],
        "task": config["task"]["name"],
        "protocol": config["protocol"]["name"],
        "seed": config["seed"],
        "lr": config["train"]["lr"],
        "batch_size": config["train"]["batch_size"],
        "trainable": record.get("trainable", {}).get("total"),
        "per_weight": record.get("trainable", {}).get("per_weight"),
        "metric": record.get("result", {}).get("metric"),
        "value": record.get("result", {}).get("value"),
        "steps_per_second": record.get("speed", {}).get("steps_per_second"),
        "peak_mib": memory.get("allocated_mib", memory.get("resident_mib")),
        "baseline_mib": memory.get("baseline_mib"),
        "engine": ENGINE_NAMES.get(engine := config["method"].get("engine"), engine),
        "device": memory.get("device"),
        "finished": record.get("environment", {}).get("finished"),
    }


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("status", "model", "method", "task", "protocol", "metric", "engine", "device", "finished"), str),
    **dict.fromkeys(("seed", "batch_size", "trainable"), int),
    **dict.fromkeys(("lr", "value", "steps_per_second", "peak_mib", "baseline_mib"), _NUMBER),
    "per_weight": dict,
}
_ALWAYS = ("status", "model", "method", "task", "protocol", "seed", "lr", "batch_size")
