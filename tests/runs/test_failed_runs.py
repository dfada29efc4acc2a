"""Runs that fail on the way: a folder or disk that cannot be written, a loss that diverges, a damaged record."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from bad_input_cases import Refused
from bad_input_cases import nothing_loaded as nothing_loaded  # the fixtures
from bad_input_cases import refused as refused
from run_fixtures import Composer, last_wins, small_files
from transformers import TrainerCallback

from sparsegrad import cli
from sparsegrad.runs import runner as runs


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("place", ["results_dir", "work_dir"])
def test_an_unwritable_folder_is_named_first(refused: Refused, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    line = refused(f"{place}={tmp_path / 'file' / 'below'}")
    assert re.search(r"cannot write .*file.below.*choose another folder", line)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".json", ".tmp")] if folder.exists() else []


def test_a_full_disk_while_writing_the_record(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = runs.write_json

    def full(path: Path, content: dict[str, Any]) -> None:
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", no_space)
            write(path, content)

    def no_space(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, "write_json", full)  # the record's; the basis is stored before
    assert re.search(r"cannot write .*results.*No space left on device; free space", refused())
    assert leftovers(tmp_path / "results") == []


@pytest.mark.parametrize("megabytes", [1, 6])  # the model has 4.1, its optimizer's state 8.2
def test_a_full_disk_while_writing_a_checkpoint(
    refused: Refused, tmp_path: Path, conf: Composer, small: Any, megabytes: int
) -> None:
    with small_files(megabytes * 10**6):
        line = refused("method=full")
    assert re.search(r"cannot write .*work.*free space there", line)
    assert leftovers(tmp_path / "results") == []
    cli.run_command(conf(*last_wins(*small, "method=full")))  # what is half written does not disturb
    (record,) = leftovers(tmp_path / "results")
    assert json.loads(record.read_text())["status"] == "complete"


def test_a_full_disk_while_storing_the_basis(refused: Refused) -> None:
    with small_files(5000):
        line = refused()
    assert re.search(r"cannot write .*free space there", line)


def test_an_error_that_is_not_of_writing_keeps_its_name(
    conf: Composer, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "the far end hung up")

    monkeypatch.setattr("sparsegrad.runs.parts.load_model", broken)
    with pytest.raises(ConnectionResetError):
        cli.run_command(conf(*small))


class Poison(TrainerCallback):  # type: ignore[misc]
    """Makes a weight NaN after step 2."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2:
            next(model.parameters()).data.fill_(float("nan"))


def test_a_diverged_run_names_the_step_leaves_a_failed_record_and_is_tried_again(
    conf: Composer, small: tuple[str, ...], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = runs.run
    monkeypatch.setattr(runs, "run", lambda config, **more: real(config, callbacks=[Poison()], **more))
    line = refused("protocol.eval_steps=4")
    assert re.search(r"not a finite number at step 3: .*lower train\.lr=0\.01.*record .*marked failed", line)
    (path,) = leftovers(tmp_path / "results")
    record = json.loads(path.read_text())
    assert record["status"] == "failed"
    assert "at step 3" in record["reason"]
    monkeypatch.setattr(runs, "run", real)
    cli.run_command(conf(*last_wins(*small, "protocol.eval_steps=4")))
    assert json.loads(path.read_text())["status"] == "complete"


def test_a_huge_rate_ends_in_one_line_or_in_finite_numbers(
    conf: Composer, small: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = last_wins(*small, "method=full", "train.lr=9.9", "protocol.max_steps=20")
    with contextlib.suppress(SystemExit):
        cli.run_command(conf(*overrides))
    (path,) = leftovers(tmp_path / "results")
    record = json.loads(path.read_text())
    if record["status"] == "complete":
        assert all(math.isfinite(row["loss"]) for row in record["evaluations"] + record["losses"])
    else:
        assert re.search(r"step \d+|predicts NaN", record["reason"])


def test_a_damaged_record_is_named(refused: Refused, conf: Composer, small: tuple[str, ...], tmp_path: Path) -> None:
    cli.run_command(conf(*small))
    (path,) = leftovers(tmp_path / "results")
    path.write_text(path.read_text()[:50])
    assert re.search(rf"{path.name} is not a readable record .*delete it and run again", refused())
