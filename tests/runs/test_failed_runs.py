"""Runs that fail on the way: a folder or disk that cannot be written, a loss that diverges, a damaged record."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input_cases import Refused
from bad_input_cases import nothing_loaded as nothing_loaded  # the fixtures
from bad_input_cases import refused as refused
from run_fixtures import Composer, Tiny, last_wins, small_files
from test_runs import LEARNS, Stop
from transformers import Trainer, TrainerCallback

from sparsegrad import cli
from sparsegrad.errors import FailedRunError, ResourceError, UserError
from sparsegrad.runs import runner as runs
from sparsegrad.runs.predictions import predictions_path
from sparsegrad.runs.runner import run
from sparsegrad.trainer import checkpoints
from sparsegrad.trainer.checkpoints import check_whole, has_checkpoint, last_checkpoint, seal


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("place", ["results_dir", "work_dir"])
def test_an_unwritable_folder_is_named_first(refused: Refused, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    line = refused(f"{place}={tmp_path / 'file' / 'below'}")
    assert re.search(r"cannot write .*file.below.*is a file: choose another folder", line)


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


class At(TrainerCallback):  # type: ignore[misc]
    """Does something after a step, and notes whether a checkpoint was there."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action, self.was_saved = step, action, False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.was_saved = has_checkpoint(Path(args.output_dir))
            self.action(model)


def poison(model: Any) -> None:
    for weight in model.parameters():
        weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("step", "interval", "message"),
    [
        (3, 2, r"not a finite number at step 4: .*lower train\.lr=0\.01"),  # the next loss is NaN
        (2, 1, r"predicts NaN or infinity for 10 of 10 rows.*lower train\.lr"),  # an evaluation comes first
    ],
)
def test_a_diverged_run_leaves_a_failed_record_and_no_checkpoint_and_is_tried_again(
    conf: Composer, small: tuple[str, ...], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    step: int, interval: int, message: str,
) -> None:  # fmt: skip
    real, spoilt = runs.run, At(step, poison)
    monkeypatch.setattr(runs, "run", lambda config, **more: real(config, callbacks=[spoilt], **more))
    line = refused("method=full", f"protocol.eval_steps={interval}")
    assert re.search(f"{message}.*record .*marked failed", line)
    (path,) = leftovers(tmp_path / "results")
    record = json.loads(path.read_text())
    assert record["status"] == "failed"
    assert re.search(message, record["reason"])
    assert spoilt.was_saved, "without a checkpoint its deletion proves nothing"
    assert not list((tmp_path / "work").glob("*/checkpoints"))
    monkeypatch.setattr(runs, "run", real)
    cli.run_command(conf(*last_wins(*small, "method=full", f"protocol.eval_steps={interval}")))
    assert json.loads(path.read_text())["status"] == "complete"


def test_a_run_that_is_forced_and_fails_keeps_the_complete_record(tiny: Tiny) -> None:
    config = tiny("method=full")
    record, _ = run(config)
    predictions = predictions_path(config.record_path).read_bytes()
    with pytest.raises(FailedRunError, match=r"not a finite number at step 4.*the complete record .* is kept"):
        run(tiny("method=full", "force=true"), callbacks=[At(3, poison)])
    assert json.loads(config.record_path.read_text()) == record
    assert predictions_path(config.record_path).read_bytes() == predictions
    assert not config.checkpoints.exists()
    config.record_path.write_text("{")  # damaged: nothing to keep
    with pytest.raises(UserError, match="marked failed"):
        run(tiny("method=full", "force=true"), callbacks=[At(3, poison)])
    assert json.loads(config.record_path.read_text())["status"] == "failed"


def test_a_process_that_writes_no_record_names_none(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process may not fail, or not here."""
    config = tiny("method=full")
    monkeypatch.setattr("sparsegrad.runs.outcome.is_main", lambda: False)
    with pytest.raises(UserError, match=r"not a finite number at step 4.*train\.lr") as raised:
        run(config, callbacks=[At(3, poison)])
    assert "record" not in str(raised.value)
    assert not config.record_path.exists()


def disk_full(checkpoint: Path, facts: Any) -> None:
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(os, "fsync", no_space)
        seal(checkpoint, facts)


def no_space(number: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fault(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_what_fails_around_a_run_costs_no_checkpoint_and_is_no_failed_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A full disk while a checkpoint is sealed; then, on resuming, a lack of memory, a disk error, another version."""
    config = tiny("method=full", "protocol.eval_steps=1")
    saving = At(2, lambda model: monkeypatch.setattr("sparsegrad.trainer.trainer.seal", disk_full))
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-2/.*: No space left"):
        run(config, callbacks=[saving])
    faults = {
        "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
        "cannot read .*checkpoint-1.* try again": OSError(errno.EIO, "Input/output error"),
        "checkpoint-1 cannot be loaded .* resume=false": ValueError("a parameter group is missing"),
    }
    for message, error in faults.items():
        monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", fault(error))
        with pytest.raises((UserError, torch.OutOfMemoryError), match=message):
            run(config)
        assert has_checkpoint(config.checkpoints), message
        assert leftovers(tmp_path / "results") == [], message
    assert str(last_checkpoint(config.checkpoints)).endswith("checkpoint-1")


class Spoil(TrainerCallback):  # type: ignore[misc]
    """Deletes the weights of the best checkpoint before training ends, or cuts them."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            weights = Path(state.best_model_checkpoint) / "model.safetensors"
            weights.unlink() if self.how == "deleted" else weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_best_checkpoint_that_was_lost_leaves_no_record_of_other_weights(tiny: Tiny, how: str) -> None:
    """The Trainer would only log a warning and keep the weights of the last step."""
    whole, _ = run(tiny(*LEARNS, "name=whole"))
    assert whole["result"]["chosen_step"] < whole["result"]["steps"], "with equal steps nothing is loaded"
    config = tiny(*LEARNS)
    with pytest.raises(ResourceError, match=r"checkpoint-12 has been damaged or deleted .* the same command"):
        run(config, callbacks=[Spoil(how)])
    assert not config.record_path.exists()
    assert run(config)[0]["result"] == whole["result"]


def test_a_run_without_any_score_fails_in_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was stopped just before its record."""
    undefined = {"accuracy": float("nan")}
    monkeypatch.setattr("sparsegrad.runs.trainer_setup.compute_metrics", lambda task: lambda prediction: undefined)
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(0)])
    with pytest.raises(UserError, match=r"accuracy is undefined in every evaluation.* train\.lr=0\.01.*marked failed"):
        run(config)
    assert json.loads(config.record_path.read_text())["status"] == "failed"


def test_a_best_checkpoint_must_be_in_sight_of_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    seal(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoints, "from_main", lambda make: None)  # the main process has found it whole
    with pytest.raises(ResourceError, match=r"model\.safetensors cannot be seen by process 0: .* all machines share"):
        check_whole(tmp_path)


def test_a_damaged_record_is_named(refused: Refused, conf: Composer, small: tuple[str, ...], tmp_path: Path) -> None:
    cli.run_command(conf(*small))
    (path,) = leftovers(tmp_path / "results")
    path.write_text(path.read_text()[:50])
    assert re.search(rf"{path.name} is not a readable record .*delete it and run again", refused())
