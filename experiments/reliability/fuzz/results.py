"""The readers of results: records, predictions, summaries of searches and losses of forgetting."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from experiments.paths import ROOT
from experiments.reliability.fuzz.base import LINES, TEXT, Reader
from experiments.report.collect import Store, collect_cells
from experiments.report.comparison.forgotten import FOLDER, read_forgetting
from experiments.report.searches import Searches
from experiments.report.tables import hyperparams
from experiments.report.tables.base import Context
from sparsegrad.cli.record_rows import read_rows
from sparsegrad.cli.records_command import make_text
from sparsegrad.cli.running import outcome
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.predictions import describe_arrays, read_predictions, write_predictions
from sparsegrad.runs.records import find_complete, load_records

_COLLECTED = ("quickstart", "glue_bert_base")  # records of the second are compared with an experiment


def _make_record(folder: Path) -> None:
    source = sorted((ROOT / "results/runs/quickstart").glob("*.json"))[0]
    shutil.copyfile(source, folder / "record.json")


def _read_record(folder: Path) -> None:
    if (record := find_complete(folder / "record.json")) is not None:
        outcome(record)
    load_records(folder)
    make_text(read_rows(folder, on_bad=_raise), width=80)


def _raise(error: UserError) -> None:
    raise error


def _make_collected(folder: Path) -> None:
    for name in _COLLECTED:
        (folder / name).mkdir()
        _make_record(folder / name)


def _read_collected(folder: Path) -> None:
    store = collect_cells(folder)
    if store.skipped:
        raise UserError(store.skipped[0])


def _make_predictions(folder: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 2, 500).astype(np.uint8) for name in ("predicted", "label")}
    write_predictions(folder / "run.json", arrays)
    write_json(folder / "run.json", {"predictions": describe_arrays(arrays)})


def _read_predictions(folder: Path) -> None:
    path = folder / "run.json"
    read_predictions(path, read_json(path))


def _make_summary(folder: Path) -> None:
    source = sorted((ROOT / "results/studies").glob("*/summary.json"))[0]
    (folder / "studies" / "one").mkdir(parents=True)
    shutil.copyfile(source, folder / "studies" / "one" / "summary.json")


def _read_summary(folder: Path) -> None:
    """As a report does, which names a damaged summary and goes on."""
    Searches(folder)
    hyperparams.tables(Context(folder, Store(), "mini"))
    if unread := hyperparams.unread(folder):
        raise UserError(unread[0])


def _make_forgetting(folder: Path) -> None:
    for key, after in (("a", 2.5), ("b", 2.75)):
        facts = {"before": 2.0, "after": after, "texts": "0123456789abcdef", "rows": 200, "tokens": 128}
        write_json(folder / FOLDER / f"{key}.json", facts)


def _read_forgetting(folder: Path) -> None:
    read_forgetting(folder)


RESULTS = {
    "records": Reader(_make_record, {"record.json": LINES}, _read_record),
    "records of a report": Reader(
        _make_collected, {f"{name}/record.json": LINES for name in _COLLECTED}, _read_collected
    ),
    "predictions": Reader(_make_predictions, {"run.npz": TEXT}, _read_predictions),
    "summaries of searches": Reader(_make_summary, {"studies/one/summary.json": LINES}, _read_summary),
    "losses of forgetting": Reader(_make_forgetting, {f"{FOLDER}/a.json": LINES}, _read_forgetting),
}
