"""Records as rows: read, narrowed by `key=value`, sorted, and averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sparsegrad.errors import UserError, did_you_mean
from sparsegrad.runs.keys import determining, flatten
from sparsegrad.runs.names import name_method
from sparsegrad.runs.records import PRUNED, find_records, read_record, run_seconds, summary

Row = dict[str, Any]
"""A record, flat: the facts of `summary`, `key`, `path` and `minutes`, and its settings by their dotted names."""

# What makes two runs comparable. Settings that differ between runs with the same of these get a column of their own;
# those of methods only where the method is the same too.
SETUP = ("model", "task", "protocol")
IDENTITY = (*SETUP, "method", "engine")
SETTINGS = ("model", "method", "engine", "task", "protocol", "lr", "batch_size", "seed", "device")
# Titles of columns that are not the last part of their name.
HEADS = {
    "batch_size": "batch",
    "steps_per_second": "steps/s",
    "peak_mib": "peak\nMiB",
    "per_weight": "per MLP\nweight",
    "minutes": "min",
    "method.steps": "calibration\nsteps",
}
SHORT_METRICS = {"matthews_correlation": "matthews"}
MEASURED = ("value", "steps_per_second", "peak_mib", "minutes")
# Dotted names of settings that `summary` already has, or that follow from the names above.
_KNOWN = ("seed", "train.lr", "train.batch_size", "method.engine", "evidence")


def read_rows(folder: Path, on_bad: Callable[[UserError], None]) -> list[Row]:
    """All records below a folder, sorted by path. A damaged one is given to `on_bad` and left out."""
    rows = []
    for path in find_records(folder):
        try:
            rows.append(_make_row(path, read_record(path)))
        except UserError as error:
            on_bad(error)
    return rows


def _make_row(path: Path, record: Mapping[str, Any]) -> Row:
    try:
        settings = flatten(determining(record["config"]))
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a readable record ({error!r}): delete it and run again") from None
    row = {**settings, **summary(record), "key": str(record.get("key", path.stem)), "path": str(path)}
    row["method"] = name_method(record["config"]["method"])
    if row["status"] != "complete" and str(record.get("reason")).startswith(PRUNED):
        row["status"] = "pruned"
    if _is_number(row["peak_mib"]) and _is_number(row["baseline_mib"]):
        row["peak_mib"] -= row["baseline_mib"]  # what training needs; the loaded model is there anyway
    seconds = run_seconds(record)
    return {**row, "minutes": None if seconds is None else seconds / 60}


def narrow(rows: Sequence[Row], conditions: Iterable[str]) -> list[Row]:
    """The rows that meet all conditions `key=value` or `key=value,value`.

    Raises:
        UserError: for a condition of another form, or a key that no record has.
    """
    kept = list(rows)
    for condition in conditions:
        key, sign, wanted = condition.partition("=")
        if not sign:
            raise UserError(f"--filter {condition} is not allowed: give key=value, for example method=lora")
        name = find_key(rows, key, "--filter")
        names = (name, "method.name") if name == "method" else (name,)  # `peft SHIRA` is a `peft` too
        kept = [row for row in kept if any(_equals(row.get(one), text) for one in names for text in wanted.split(","))]
    return kept


def find_key(rows: Sequence[Row], key: str, option: str) -> str:
    """The name in rows of `key`: it may be `score`, a title of the table, or a setting without its group.

    Raises:
        UserError: when no record has it, or several settings end with it.
    """
    known = list(dict.fromkeys(name for row in rows for name in row))
    titles = {make_title(name).replace("\n", " "): name for name in known} | {"score": "value"}
    metrics = {row["metric"] for row in rows} - {None}
    if len(metrics) == 1:  # it is the title of the scores then
        titles |= dict.fromkeys(metrics, "value") | {shorten_metric(metric): "value" for metric in metrics}
    names = titles | {name: name for name in known}
    if key in names:
        return names[key]
    ends = [name for name in known if name.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{option} {key} is not allowed: choose one of {', '.join(ends)}")
    hint = did_you_mean(key, [*names, *(name.rpartition(".")[2] for name in known)])
    raise UserError(f"{option} {key} is not allowed: no record has it; {hint or 'give a setting, such as method'}")


def make_title(name: str) -> str:
    """The title of a column."""
    return HEADS.get(name) or name.rpartition(".")[2].replace("_", " ")


def shorten_metric(metric: Any) -> str:
    """The name of a metric in titles and cells."""
    return SHORT_METRICS.get(metric, str(metric))


def sort(rows: Sequence[Row], name: str, reverse: bool = False) -> list[Row]:
    """The rows by one of their values; those without it come last."""
    there = [row for row in rows if row.get(name) is not None]
    numbers = all(_is_number(row[name]) for row in there)
    there.sort(key=lambda row: row[name] if numbers else str(row[name]), reverse=reverse)
    return there + [row for row in rows if row.get(name) is None]


def find_differences(rows: Sequence[Row]) -> list[str]:
    """Dotted names of settings that differ between runs of one model, task and protocol, or of one method of these."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if "." in name]
    names = [name for name in names if not name.startswith(_KNOWN) and not name.endswith(".name")]
    setups, methods = _group(rows, SETUP), _group(rows, IDENTITY)
    return [name for name in names if _differs(name, methods if name.startswith("method.") else setups)]


def _group(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _differs(name: str, groups: Sequence[Sequence[Row]]) -> bool:
    return any(len({repr(row.get(name)) for row in group}) > 1 for group in groups)


def average(rows: Sequence[Row]) -> list[Row]:
    """One row for the runs that differ in nothing but the seed: means, `seeds`, and `value_std` (n - 1)."""
    names = (*(name for name in SETTINGS if name != "seed"), "status", "metric", *find_differences(rows))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(repr(row.get(name)) for name in names), []).append(row)
    return [_average(group) for group in groups.values()]


def _average(group: Sequence[Row]) -> Row:
    means: dict[str, Any] = {}
    for name in MEASURED:
        found = [row[name] for row in group if _is_number(row[name])]
        means[name] = fmean(found) if found else None
        if name == "value":
            means["value_std"] = stdev(found) if len(found) > 1 else None
    return {**group[0], **means, "seeds": len({row["seed"] for row in group})}


def _equals(value: Any, text: str) -> bool:
    if _is_number(value):
        try:
            return math.isclose(float(text), value, rel_tol=1e-9)
        except ValueError:
            return False
    return str(value).lower() == text.strip().lower()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
