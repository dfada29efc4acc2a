"""Measure how long a report takes over many records, which are varied copies of the committed ones.

python -m experiments.reliability.many_records --count 10000     # results/reliability/records.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.paths import ROOT
from experiments.report.collect import collect_cells
from experiments.report.command import write_report
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment
from sparsegrad.runs.records import load_records

FOLDERS = ("glue_bert_base", "glue_roberta_base")  # two folders that tables read


def write_records(runs: Path, count: int) -> int:
    """Write `count` records below `runs`, each with its own seed; returns their total size in bytes."""
    sources = [path.read_text() for path in sorted((ROOT / "results/runs").rglob("*.json"))]
    size = 0
    for number in range(count):
        record = json.loads(sources[number % len(sources)])
        record["config"]["seed"] = number
        text = json.dumps(record, indent=1)
        path = runs / FOLDERS[number % len(FOLDERS)] / f"{number:016x}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        size += len(text)
    return size


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Wall-clock and processor seconds of a call."""
    start, began = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return {
        "seconds": round(time.monotonic() - start, 2),
        "processor_seconds": round(time.process_time() - began, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write records, load them, make a report; print and store the times."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reliability.many_records", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "results/reliability/records.json")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        results = Path(name)
        size = write_records(results / "runs", chosen.count)
        facts = {
            "records": chosen.count,
            "megabytes": round(size / 1e6, 1),
            "load as cells of tables": measure(lambda: collect_cells(results / "runs")),
            "load as a DataFrame": measure(lambda: load_records(results / "runs")),
            "every table, figure and the page": measure(lambda: write_report("all", "paper", results)),
        }
    print(facts)
    write_json(chosen.out, {**facts, "environment": describe_environment(torch.device("cpu"))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
