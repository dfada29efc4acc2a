"""What a sweep found: shown, exported, and used by runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import Composer
from test_sweep import Sweep, study_of
from test_sweep import composed as composed  # the fixture

from experiments.report.tables import searched
from sparsegrad.cli import running
from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.sweeps import __main__ as sweep
from sparsegrad.sweeps import hparams
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.pool import _explain_use, run_sweep


def test_the_best_feeds_back(composed: Sweep, conf: Composer, small: tuple[str, ...]) -> None:
    run_sweep(composed())
    best = study_of(composed()).best_params
    options = conf(*[one for one in small if not one.startswith("train.lr")], "hparams=study:s")
    assert running.apply_hparams(options) == {"hparams": {"from": "study:s", **best}}
    assert options.train.lr == best["train.lr"]
    with pytest.raises(UserError, match=r"has no study t; it has: s"):
        running.apply_hparams(conf(*small, "hparams=study:t"))
    with pytest.raises(UserError, match="searched minilm / sparsegrad / sst2, this run is minilm / lora / sst2"):
        running.apply_hparams(conf(*small, "hparams=study:s", "method=lora"))


def test_a_searched_size_takes_the_place_of_the_default_but_not_of_one_by_hand(
    composed: Sweep, conf: Composer, small: tuple[str, ...]
) -> None:
    run_sweep(composed("sweep.space={method.keep:{choice:[68,69]}}", "sweep.sampler=grid", "sweep.trials=1"))
    options = conf(*small, "hparams=study:s")
    assert options.method.density == 0.01
    running.apply_hparams(options)
    method: Any = build(options).method
    assert (method.density, method.keep) == (None, 68)
    by_hand = conf(*small, "hparams=study:s", "method.density=0.02")
    assert hparams.apply(by_hand, ["method.density"]) == {"from": "study:s"}
    method = build(by_hand).method
    assert (method.density, method.keep) == (0.02, None)


def test_published_and_authors_values(conf: Composer) -> None:
    for name, model, method, task, batch, lr in (
        ("paper", "bert_base", "sparsegrad", "cola", 32, 3.15e-5),
        ("paper", "roberta_base", "full", "qnli", 16, 8.83e-6),
        ("authors", "roberta_base", "full", "qnli", 16, 8.38e-6),
        ("authors", "roberta_large", "sparsegrad_authors", "stsb", 16, 2.11e-5),
    ):
        options = conf(f"model={model}", f"method={method}", f"task={task}", f"hparams={name}")
        running.apply_hparams(options)
        assert (options.train.batch_size, options.train.lr) == (batch, lr)
    with pytest.raises(UserError, match="hparams=paper has nothing for minilm / sparsegrad / snippets"):
        running.apply_hparams(conf("hparams=paper"))
    with pytest.raises(UserError, match="choose paper, authors, search or study:NAME"):
        running.apply_hparams(conf("hparams=mine"))


def test_show_writes_figures_trials_and_plots(
    composed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(composed("sweep.space={train.lr:{float:[1e-5,1e-1],log:true},train.batch_size:{choice:[2,4]}}"))
    results = str(tmp_path / "results")
    assert sweep.main(["show", "s", "--results-dir", results]) == 0
    folder = tmp_path / "results" / "studies" / "s"
    figures = json.loads((folder / "summary.json").read_text())
    assert figures["trials"]["complete"] == 6
    assert len((folder / "trials.csv").read_text().splitlines()) == 7
    for name in ("history", "intermediate", "importance", "slice", "parallel"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert "plotly" in (folder / f"{name}.html").read_text()
    assert sweep.main(["list", "--results-dir", results]) == 0
    assert sweep.main(["show", "t", "--results-dir", results]) == 2
    assert "has no study t; it has: s" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list"], ["address"], ["show", "s"]])
def test_before_the_first_study_the_commands_say_what_to_do(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*command, "--results-dir", str(tmp_path / "none")]) == 2
    line = capsys.readouterr().err
    assert "no study yet" in line
    assert "run.py sweep=quick" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_table_sets_found_beside_published(
    composed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(composed())
    assert searched.main(["--results-dir", str(tmp_path / "results")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| 13 |", "| 14 |", "| 15 |")) for line in lines) == 24
    assert "| 13 | bert_base | sparsegrad | cola | 32 / 3.15e-05 | 32 / 3.15e-05 | 32 / 3.15e-05 |  |  |  |" in lines
    assert lines[-1].startswith("|  | minilm | sparsegrad | sst2 |")


@pytest.mark.parametrize("form", ["journal:{}/s.log", "{}/s.db"])
def test_the_table_reads_every_storage_and_refuses_one_that_is_not_there(
    form: str, composed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = form.format(tmp_path)
    assert searched.main(["--storage", place]) == 2
    assert "does not exist" in capsys.readouterr().err
    run_sweep(composed(f"sweep.storage={place}"))
    capsys.readouterr()
    assert searched.main(["--storage", place]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| s |")


@pytest.mark.parametrize("is_exported", [False, True])
def test_the_hints_work_in_another_shell(
    is_exported: bool,
    composed: Sweep,
    conf: Composer,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Slurm job sets the variable for itself only, so that the shell that reads its log does not have it."""
    place = f"journal:{tmp_path}/a folder/s.log"
    if is_exported:
        monkeypatch.setenv(hparams.STORAGE, place)
    run_sweep(composed(*([] if is_exported else [f"sweep.storage='{place}'"])))
    monkeypatch.delenv(hparams.STORAGE, raising=False)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("use it: ")]
    use, show = line.removeprefix("use it: ").split("; details: ")
    variable, *_, study, results = shlex.split(use)
    run = conf(*[one for one in small if not one.startswith(("train.lr", "results_dir"))], study, results)
    with pytest.raises(UserError, match="if it is elsewhere, set SPARSEGRAD_STORAGE"):
        hparams.apply(run, ())
    monkeypatch.setenv(*variable.split("=", 1))
    assert hparams.apply(run, ())["from"] == "study:s"
    monkeypatch.delenv(hparams.STORAGE)
    assert sweep.main(shlex.split(show)[3:]) == 0


def test_no_hint_has_a_password(composed: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "postgresql://me:sesame@host/sweeps?sslmode=require"
    plan = make_plan(composed(f"sweep.storage='{place}'"))
    shown = "'postgresql+psycopg://me:***@host/sweeps?sslmode=require'"
    assert f"use it: SPARSEGRAD_STORAGE={shown} python run.py" in (said := _explain_use(plan))
    assert f" --storage {shown}" in said
    monkeypatch.setenv(hparams.STORAGE, place)
    assert "storage" not in _explain_use(plan).lower(), "the variable has the password, which the hint cannot have"
