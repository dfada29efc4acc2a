"""Sweeps: what cannot go well is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from run_fixtures import write_rows
from test_sweep import Sweep, states, study_of
from test_sweep import composed as composed  # the fixture

from sparsegrad.cli import running
from sparsegrad.errors import UserError
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.reporter import Reporter
from sparsegrad.sweeps.show import summary
from sparsegrad.sweeps.storage import hide_password, open_existing_store, patiently


def test_a_user_error_ends_the_sweep_and_the_next_call_redoes_the_trial(composed: Sweep) -> None:
    for _ in range(4):  # more often than sweep.retries: the user's mistakes do not use up a trial
        with pytest.raises(UserError, match="the model is not there"):
            run_sweep(composed("sweep.runner=sweep_fakes.refuse"))
    run_sweep(composed())
    study = study_of(composed())
    assert states(study) == ["FAIL"] * 4 + ["COMPLETE"] * 6
    assert {trial.params["train.lr"] for trial in study.trials[:5]} == {study.trials[0].params["train.lr"]}


def test_a_value_that_is_refused_with_the_model_is_pruned_and_the_sweep_goes_on(
    composed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = composed(
        "sweep.runner=sparsegrad.runs.run", "method=lora", "sweep.sampler=grid", "protocol.max_steps=2",
        "sweep.space={method.rank:{choice:[64,4]}}",  # the weights are 32 x 64
    )  # fmt: skip
    run_sweep(options)
    study = study_of(options)
    assert states(study) == ["PRUNED", "COMPLETE"]
    assert "rank=64" in study.trials[0].user_attrs["reason"]
    assert "rank=64" in summary(study)["reasons"]["0"]
    assert "1 refused" in capsys.readouterr().out
    # Whether the other values can start was tried without a trace.
    assert len(list((tmp_path / "results" / "runs" / "s").glob("*.json"))) == 1
    assert not (tmp_path / "work" / make_plan(options).base.key).exists()
    assert not list((tmp_path / "work").glob("tmp*"))


def test_a_fault_in_training_that_is_not_due_to_the_values_ends_the_sweep(composed: Sweep) -> None:
    options = composed("sweep.runner=sweep_fakes.fill_disk")
    with pytest.raises(UserError, match="the disk is full"):
        run_sweep(options)
    assert states(study_of(options)) == ["FAIL"]


def test_a_trial_with_checkpoints_of_other_data_ends_the_sweep(composed: Sweep, tmp_path: Path) -> None:
    real = ("sweep.runner=sparsegrad.runs.run", "sweep.trials=2", "protocol.max_steps=4", "protocol.eval_steps=1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Reporter, "on_step_end", stop_after_three_steps)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(composed(*real))
    other = f"data.dir={write_rows(tmp_path / 'other', train=30)}"
    for _ in range(2):
        with pytest.raises(UserError, match=r"other data .*resume=false"):
            run_sweep(composed(*real, other))
    run_sweep(composed(*real, other, "resume=false"))
    assert states(study_of(composed(*real))) == ["FAIL"] * 3 + ["COMPLETE"] * 2


def stop_after_three_steps(reporter: Reporter, args: Any, state: Any, control: Any, **_: Any) -> None:
    if state.global_step == 3:
        raise KeyboardInterrupt


def test_a_trial_that_diverges_beside_its_complete_record_is_pruned(composed: Sweep) -> None:
    """As with force=true, which keeps that record."""
    run_sweep(composed("sweep.trials=1"))
    options = composed("sweep.trials=1", "sweep.runner=sweep_fakes.diverge", "sweep.overwrite=true")
    run_sweep(options)
    assert states(study_of(options)) == ["PRUNED"]
    assert study_of(options).trials[0].user_attrs["reason"] == "the loss is not a finite number"


def test_a_crash_is_not_retried_forever(composed: Sweep) -> None:
    options = composed("sweep.runner=sweep_fakes.crash", "sweep.trials=1")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run_sweep(options)
    run_sweep(options)
    study = study_of(options)
    assert states(study) == ["FAIL", "FAIL", "PRUNED"]
    assert study.trials[2].user_attrs["reason"] == "ZeroDivisionError: a programming error"


def test_another_study_of_the_name_is_refused_and_overwritten_on_request(composed: Sweep) -> None:
    run_sweep(composed())
    other = "sweep.space={train.lr:{float:[1e-4,1e-2],log:true}}"
    with pytest.raises(UserError) as error:
        run_sweep(composed(other))
    for part in ("1e-05", "0.0001", "sweep.study=", "sweep.overwrite=true"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="another direction: there maximize, here minimize"):
        run_sweep(composed("sweep.direction=minimize"))
    with pytest.raises(UserError, match=r"another seed: there 42, here 7"):
        run_sweep(composed("seed=7"))
    run_sweep(composed(other, "sweep.overwrite=true"))
    assert all(1e-4 <= trial.params["train.lr"] <= 1e-2 for trial in study_of(composed(other)).trials)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.space={}", "sweep.space is empty"),
        ("sweep.space={train.rl:{float:[1,2]}}", "no value train.rl; did you mean train.lr?"),
        ("sweep.space={train:{float:[1,2]}}", "no value train"),
        ("sweep.space={train.lr:{float:[1e-3,1e-3]}}", "empty range [0.001, 0.001]"),
        ("sweep.space={train.lr:{float:[1e-2,1e-3]}}", "empty range [0.01, 0.001]"),
        ("sweep.space={train.lr:{float:[0,1e-3],log:true}}", "give bounds above 0 for a logarithm"),
        ("sweep.space={train.lr:{float:[1e-3]}}", "give [low, high]"),
        ("sweep.space={train.lr:{float:[a,b]}}", "give a number"),
        ("sweep.space={train.lr:{float:[1e-4,1e-3],lg:true}}", "has lg; a float allows log, methods, points"),
        ("sweep.space={train.lr:5}", "is not understood"),
        ("sweep.space={train.lr:{range:[1,2]}}", "is not understood"),
        ("sweep.space={train.batch_size:{int:[1.5,3]}}", "give a whole number"),
        ("sweep.space={train.batch_size:{choice:[]}}", "an empty choice"),
        ("sweep.space={train.batch_size:{choice:[4,4]}}", "one choice twice"),
        ("sweep.space={train.batch_size:{choice:[0,4]}}", "train.batch_size=0 is not allowed"),
        ("sweep.space={train.lr:{float:[1e-3,20]}}", "train.lr=20"),
        ("sweep.space={train.lr:{float:[1e-4,1e-3],methods:lora}}", "give a list of names"),
        ("sweep.space={train.lr:{float:[1e-4,1e-3],methods:[lora]}}", "has no key for method=sparsegrad"),
        ("sweep.workers=0", "sweep.workers=0 is not allowed"),
        ("sweep.trials=0", "sweep.trials=0 is not allowed"),
        ("sweep.sampler=bayes", "choose one of tpe, gp, qmc, random, grid"),
        ("sweep.pruner=fast", "choose one of none, median, hyperband, patience"),
        ("sweep.objective=test", "choose one of heldout, validation"),
        ("task=oasst1", "sweep.direction=maximize is not allowed: oasst1 is scored by a loss"),
        ("sweep.metric=bleu", "sweep.metric=bleu is not allowed: choose one of accuracy, loss"),
        ("sweep.heartbeat=0", "sweep.heartbeat=0 is not allowed"),
        ("sweep.sampler=grid", "a float range without points"),
        ("sweep.runner=nowhere.run", "sweep.runner=nowhere.run cannot be imported"),
        ("sweep.study=../x", "name=../x is not allowed"),
        ("sweep.storage=''", "give a file or URL"),
        ("sweep.storage=mysql://", "sweep.storage=mysql:"),
        ("sweep.storage=nonsense://x", "cannot be used"),
        ("sweep.storage=/proc/none/studies.db", "cannot write /proc/none"),
        ("sweep.storage=grpc://here", "host and port are needed"),
        ("sweep.storage='postgresql://me:sesame@127.0.0.1:9/x'", "postgresql+psycopg://me:***@127.0.0.1:9/x"),
    ],
)
def test_bad_input_is_one_clear_line(
    composed: Sweep, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        running.run_command(composed(override))
    assert ended.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert said in shown
    assert len(shown.splitlines()) == 1
    assert "sesame" not in shown


def test_a_storage_of_a_newer_schema_is_refused(composed: Sweep) -> None:
    import sqlite3

    run_sweep(composed())
    file = make_plan(composed()).sweep.storage
    with sqlite3.connect(file) as database:
        database.execute("update version_info set schema_version = 99, library_version = '99.0.0'")
        database.execute("update alembic_version set version_num = 'v99.0.0.a'")
    with pytest.raises(UserError, match="cannot be used"):
        run_sweep(composed())


def test_a_study_is_not_continued_with_other_data(composed: Sweep, tmp_path: Path) -> None:
    """`data.dir` is no part of a run's key: without this check one study would mix two data sets."""
    real = "sweep.runner=sparsegrad.runs.run"
    given = ("sweep.sampler=random", "sweep.objective=validation", real, "train.lr=1e-3")
    space = "sweep.space={train.batch_size:{choice:[4,6]}}"
    run_sweep(composed(*given, space, "sweep.trials=1"))
    other = write_rows(tmp_path / "other", train=30)
    with pytest.raises(UserError, match=r"study s was searched with another data .*sweep\.study="):
        run_sweep(composed(*given, space, "sweep.trials=2", f"data.dir={other}"))
    run_sweep(composed(*given, space, "sweep.trials=2"))
    assert states(study_of(composed(*given, space))) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("where", ["sqlite:///{}/no.db", "journal:{}/no.log", "{}/no.log"])
def test_reading_a_storage_that_does_not_exist_creates_nothing(where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no study yet: .*/no\..* does not exist"):
        open_existing_store(where.format(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_password_in_the_query_is_hidden_too() -> None:
    shown = hide_password("postgresql://user@host/sweeps?sslmode=require&password=sesame&sslpassword=open")
    assert "sesame" not in shown
    assert "open" not in shown
    assert "sslmode=require" in shown
    assert "password=***" in shown


def test_a_storage_that_is_away_for_a_moment_is_asked_again() -> None:
    answers: list[Any] = [StorageInternalError("away"), StorageInternalError("away"), 7]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, seconds=0.4) == 7
    answers[:] = [StorageInternalError("away")] * 9
    with pytest.raises(StorageInternalError):
        patiently(ask, seconds=0.1)
    answers[:] = [ValueError("a mistake"), 7]
    with pytest.raises(ValueError, match="a mistake"):
        patiently(ask, seconds=9)
