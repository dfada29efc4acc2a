"""Which complete records of the evidence are made again, and which runs are named because they will not count."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_commands import places as places  # the fixtures
from evidence_commands import results as results

from experiments.reproduce import evidence, making
from experiments.reproduce.cells import Cell, list_cells
from experiments.reproduce.counting import Watch, mark_uncounted, set_aside
from experiments.reproduce.plans import read_plan
from experiments.reproduce.processes import EndedJob, Job
from sparsegrad.errors import BUSY, ResourceError
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
        (lambda record: predictions_path(record).unlink(), (), "make evidence BLOCK=0 DATA=<glue folder> makes it"),
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
    monkeypatch.setattr(making, "make", lambda cells, _: asked.extend(one.is_again for one in cells) or 0)
    arguments = ["0", "task=stsb", "train.lr=1e-4", *places, *given]
    assert evidence.main([*arguments, "--dry"]) == 0
    said = capsys.readouterr().out
    assert "make report" not in said
    assert ("complete records that are made again" in said) is bool(reason)
    assert reason in said
    assert ("again 1" in said or "again" in said.split()) is bool(reason)
    assert ("0 of 1" in said) is bool(reason)
    assert evidence.main(arguments) == 0
    assert asked == [bool(reason)]
    folder = planned.config.results_dir
    assert capsys.readouterr().out.endswith(f'next: make report ARGS="--results-dir {folder}" rebuilds the tables\n')


def test_a_run_that_is_made_again_for_its_predictions_continues_after_a_stop(
    planned: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `force=true` or with its earlier record in place, it would begin anew or not at all."""
    record = planned.config.record_path
    content, aside, begun = record.read_text(), record.with_name(f"{record.name}.aside"), list[bool]()
    predictions_path(record).unlink()
    (cell,) = mark_uncounted([planned], read_plan("evidence_gates"))

    def work(jobs: Iterable[Job], _: int, is_needed: Callable[[Job], bool], **__: Any) -> Iterator[EndedJob]:
        for job in filter(is_needed, jobs):
            assert "force=true" not in job.command
            begun.append(record.exists())
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
            if len(begun) == 2:
                record.write_text(content)
            yield EndedJob(job=job, status=0 if record.exists() else 130, minutes=1.0)

    monkeypatch.setattr(making, "run_jobs", work)
    assert making.make([cell], 1) == 1
    assert aside.read_text() == content
    assert making.make(mark_uncounted([planned], read_plan("evidence_gates")), 1) == 0
    assert begun == [False, False]
    assert not aside.exists()


def test_a_record_that_another_call_has_made_again_stays(planned: Cell) -> None:
    predictions_path(planned.config.record_path).unlink()
    (cell,) = mark_uncounted([planned], read_plan("evidence_gates"))
    write_json(planned.config.record_path, json.loads(planned.config.record_path.read_text()))
    set_aside(cell)
    assert planned.config.record_path.exists()
    assert Watch([cell]).is_made(cell)


def test_a_record_whose_predictions_cannot_be_read_now_is_not_made_again(
    planned: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ResourceError, match=r"Input/output error.*try again"):
        mark_uncounted([planned], read_plan("evidence_gates"))


def test_a_cell_that_another_call_took_is_not_called_done(
    planned: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = planned.config.record_path
    content = record.read_text()
    record.unlink()

    def work(jobs: Iterable[Job], *_: Any, **__: Any) -> Iterator[EndedJob]:
        for job in jobs:
            yield EndedJob(job=job, status=BUSY, minutes=0.1)
            record.write_text(content)

    monkeypatch.setattr(making, "run_jobs", work)
    monkeypatch.setattr(making, "lacks_hub", lambda _: False)
    assert making.make([planned], 1) == 0
    said = capsys.readouterr().out
    assert f"{planned.experiment} {planned.label}: at work in another call (0.1 min); 1 cells left" in said
    assert said.endswith("1 of 1 cells complete, 0 of them by this call\n")


def test_a_record_of_an_edited_plan_is_named_and_not_repeated(
    planned: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    change_plan(planned.config.record_path)
    assert mark_uncounted([planned], read_plan("evidence_gates")) == [planned]
    said = capsys.readouterr().out
    assert "its plan evidence_gates was edited afterwards; ARGS=force=true" in said


def test_a_run_that_the_table_will_not_count_is_named_before_it_starts(
    planned: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.config.record_path.unlink()
    plan = read_plan("evidence_gates")
    assert mark_uncounted([planned], plan) == [planned]
    assert capsys.readouterr().out == ""
    assert mark_uncounted([planned], replace(plan, seeds=(7,))) == [planned]
    assert "will not count in the table: 1\n  1: not as its plan says: seed=42" in capsys.readouterr().out
