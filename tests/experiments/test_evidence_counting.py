"""Which complete records of the evidence are made again, and which runs are named because they will not count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence_commands import places as places  # the fixtures
from evidence_commands import results as results

from experiments.reproduce import evidence
from experiments.reproduce.cells import Cell, list_cells
from experiments.reproduce.counting import force_uncounted
from experiments.reproduce.plans import read_plan
from sparsegrad.files import write_json
from sparsegrad.runs.predictions import describe_arrays, predictions_path, write_predictions


@pytest.fixture
def planned(results: Path, places: list[str]) -> Cell:
    """A cell of block 0 with a record that counts."""
    (cell,) = list_cells("evidence_gates", ["task=stsb", "train.lr=1e-4", *places])
    arrays = {"predicted": np.linspace(0, 1, 5, dtype=np.float32), "label": np.linspace(0, 1, 5, dtype=np.float32)}
    record = {
        "schema": 1,
        "status": "complete",
        "plan": {"experiment": "evidence_gates", "sha256": read_plan("evidence_gates").sha256},
        "config": cell.config.resolved,
        "result": {"metric": "pearson", "value": 1.0},
        "predictions": describe_arrays(arrays),
    }
    write_json(cell.config.record_path, record)
    write_predictions(cell.config.record_path, arrays)
    return cell


def change_plan(record: Path) -> None:
    found = json.loads(record.read_text())
    write_json(record, {**found, "plan": {**found["plan"], "sha256": "0" * 16}})


@pytest.mark.parametrize(
    ("spoil", "given", "reason"),
    [
        (lambda _: None, (), ""),
        (lambda _: None, ("force=true",), "1: force=true"),
        (lambda record: predictions_path(record).unlink(), (), "run it again with force=true"),
    ],
    ids=["counts", "asked", "no predictions"],
)
def test_a_record_without_its_predictions_is_listed_and_made_again(
    spoil: Callable[[Path], None],
    given: tuple[str, ...],
    reason: str,
    planned: Cell,
    places: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(planned.config.record_path)
    asked: list[bool] = []
    monkeypatch.setattr(evidence.making, "make", lambda cells, _: asked.extend(one.config.force for one in cells) or 0)
    arguments = ["0", "task=stsb", "train.lr=1e-4", *places, *given]
    assert evidence.main([*arguments, "--dry"]) == 0
    said = capsys.readouterr().out
    assert ("complete records that are made again" in said) is bool(reason)
    assert reason in said
    assert ("again 1" in said or "again" in said.split()) is bool(reason)
    assert ("0 of 1" in said) is bool(reason)
    assert evidence.main(arguments) == 0
    assert asked == [bool(reason)]


def test_a_record_of_an_edited_plan_is_named_and_not_repeated(
    planned: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    change_plan(planned.config.record_path)
    assert force_uncounted([planned], read_plan("evidence_gates")) == [planned]
    said = capsys.readouterr().out
    assert "its plan evidence_gates was edited afterwards; ARGS=force=true" in said


def test_a_run_that_the_table_will_not_count_is_named_before_it_starts(
    planned: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.config.record_path.unlink()
    plan = read_plan("evidence_gates")
    assert force_uncounted([planned], plan) == [planned]
    assert capsys.readouterr().out == ""
    assert force_uncounted([planned], replace(plan, seeds=(7,))) == [planned]
    assert "will not count in the table: 1\n  1: not as its plan says: seed=42" in capsys.readouterr().out
