"""The table of `make quickstart`: `python -m sparsegrad.cli.quickstart_table FOLDER`, MLP weights and rest apart."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad.cli.text_table import Column, render
from sparsegrad.errors import UserError, run_as_command
from sparsegrad.runs.records import read_record, summary
from sparsegrad.runs.result_lines import rest_count

_ORDER = ("full", "lora", "meprop", "sparsegrad", "sparsegrad_fast")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the newest record of each method below a folder; status 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsegrad.cli.quickstart_table", description="Compare the methods of one folder of records."
    )
    parser.add_argument("folder", type=Path, help="for example outputs/quickstart/runs/quickstart")
    folder = parser.parse_args(arguments).folder
    return run_as_command(lambda: print(make_text(folder)))


def make_text(folder: Path) -> str:
    """The table, and two sentences on what to look at.

    Raises:
        UserError: where no record is complete.
    """
    records = {record["config"]["method"]["name"]: record for record in _read_complete(folder)}
    if not records:
        raise UserError(f"no complete record below {folder}: run make quickstart")
    found = sorted(records.values(), key=_rank)
    return f"{_make_table(found)}\n\n{_explain(found)}"


def _read_complete(folder: Path) -> list[dict[str, Any]]:
    """The records that count MLP weights and the rest apart, the oldest first."""
    found = [read_record(path) for path in folder.rglob("*.json")]
    found = [one for one in found if one["status"] == "complete" and "mlp" in one["trainable"]]
    return sorted(found, key=lambda one: str(one["environment"].get("finished")))


def _rank(record: Mapping[str, Any]) -> int:
    name = record["config"]["method"]["name"]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _make_table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [summary(record) for record in records]
    counts = [record["trainable"] for record in records]
    mlp = [one["mlp"] for one in counts]
    metric = str(rows[0]["metric"])
    return render(
        [
            Column("method", [_name_method(row) for row in rows]),
            Column("MLP weights\ntrained", [f"{one['trained']:,}" for one in mlp]),
            Column("%", [f"{100 * one['trained'] / one['total']:.1f}" for one in mlp]),
            Column("rest\ntrained", [f"{rest_count(one):,}" for one in counts]),
            Column(metric, [f"{row['value']:.4f}" for row in rows]),
            Column("steps/s", [_format_number(row["steps_per_second"], ".2f") for row in rows]),
            Column("MiB", [_format_memory(row) for row in rows]),
        ]
    )


def _name_method(row: Mapping[str, Any]) -> str:
    if row["method"] == "sparsegrad_fast":
        return "sparsegrad, fast"
    return f"{row['method']}, {row['engine']}" if row["engine"] else str(row["method"])


def _format_memory(row: Mapping[str, Any]) -> str:
    peak = row["peak_mib"]
    return "-" if peak is None else f"{peak - (row['baseline_mib'] or 0):,.0f}"


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _explain(records: Sequence[Mapping[str, Any]]) -> str:
    total = records[0]["trainable"]["mlp"]["total"]
    return (
        f"What to look at: of the {total:,} MLP weights, all methods but full train\n"
        "about 1 %, or update as many per step, while the rest trains in all rows, as in\n"
        "the paper (train.train_rest=false freezes it).\n"
        "All scores should be far above 0.50, the majority class; one seed and one\n"
        "learning rate do not show which method is best."
    )


if __name__ == "__main__":
    sys.exit(main())
