"""The `make` commands in messages can be typed as they stand; two calls of one job write two logs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from run_fixtures import ROOT

from experiments.compare import forgetting
from experiments.reproduce.commands import carried
from experiments.reproduce.places import in_words_of_make, name_of_place
from experiments.reproduce.processes import log_path
from sparsegrad.sweeps.make_commands import NO_TREES, make_command, search_command


def test_a_command_has_the_values_of_the_call_and_no_others() -> None:
    assert (
        make_command("search", data="glue", tasks=["stsb", "cola"])
        == "make search SCALE=mini DATA=glue TASKS=stsb,cola"
    )
    said = make_command("reproduce-table5", scale="paper", args=["seed=1", "train.lr=1"])
    assert said == 'make reproduce-table5 SCALE=paper ARGS="seed=1 train.lr=1"'
    for folder in ("my glue", "it's", 'a "b" $c'):
        assert shlex.split(make_command("search", data=folder))[-1] == f"DATA={folder}"


def test_a_language_task_takes_trees() -> None:
    assert search_command("search", ["lora"], ["oasst1"], "trees.jsonl").split()[3] == "TREES=trees.jsonl"
    assert f"TREES={NO_TREES} METHODS=lora" in search_command("compare", ["lora"], ["oasst1"], None)


def test_arguments_are_carried_once() -> None:
    given = ["results_dir=results", "hydra.mode=RUN", "sweep.overwrite=false", "work_dir=w"]
    assert carried(given, "sweep.overwrite=true") == ["work_dir=w", "sweep.overwrite=true"]


@pytest.mark.parametrize(
    ("said", "place", "words"),
    [
        ("data.dir=x is no folder: correct the path, use the hub with data.dir=null, or task=snippets data.dir=null, "
         "which needs no hub", "DATA", "DATA=x is no folder: correct the path, use the hub without DATA"),
        ("data.dir=x: no such file: give one, or null for the hub, or use task=alpaca, which needs no hub",
         "TREES", "TREES=x: no such file: give one, or no TREES for the hub"),
    ],
)  # fmt: skip
def test_errors_of_runs_are_in_the_words_of_make(said: str, place: str, words: str) -> None:
    assert in_words_of_make(said, place) == words


def test_conversations_are_called_trees() -> None:
    assert [name_of_place(one) for one in ("oasst1", "stsb")] == ["TREES", "DATA"]


def test_two_calls_do_not_share_a_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = log_path(str(tmp_path), "key")
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert log_path(str(tmp_path), "key") != first


def ask_make(*words: str) -> subprocess.CompletedProcess[str]:
    """What `make` would run, or why it refuses."""
    old = ("--old-file=pyproject.toml", "--old-file=constraints.txt")
    command = ["make", "--dry-run", "--no-print-directory", *old, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("target", "scale"),
    [("search", "mini"), ("compare", "mini"), ("evidence", "mini"), ("reproduce-table5", "paper")],
)
def test_searches_and_comparisons_are_of_the_small_models_by_default(target: str, scale: str) -> None:
    assert f"--scale {scale} " in ask_make(target).stdout
    assert "--scale other " in ask_make(target, "SCALE=other").stdout


@pytest.mark.parametrize("target", ["search", "evidence", "compare"])
def test_methods_tasks_and_places_reach_the_command(target: str) -> None:
    said = ask_make(target, "METHODS=lora,full", "TASKS=stsb", "WORKERS=3", "TREES=t", "DATA=d", "DRY=1").stdout
    for option in ("--methods lora,full", "--tasks stsb", "--workers 3", "--trees t", "--data d", "--dry"):
        assert option in said


def test_the_table_is_written_by_the_command_that_knows_its_folder() -> None:
    said = ask_make("reproduce-table5", "TREES=t", "ARGS=results_dir=elsewhere").stdout.split()
    assert said.count("-m") == 1
    assert {"--trees", "results_dir=elsewhere"} < set(said)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["reproduce-table5", "METHODS=lora", "TASKS=stsb", "WORKERS=4"], "takes no METHODS TASKS WORKERS; it takes"),
        (["reproduce-table5", "WORKERS=4"], 'ARGS="method=lora task=stsb" chooses runs'),
        (["evidence", "LAUNCHER=slurm"], "make evidence takes no LAUNCHER; it takes ARGS BLOCK DATA"),
        (["search", "BLOCK=2a"], "make search takes no BLOCK"),
        (["forgetting", "TASKS=oasst1"], "make forgetting takes no TASKS"),
        (["report", "DATA=glue"], "make report takes no DATA; it takes ARGS"),
        (["clean", "ARGS=x"], "make clean takes no ARGS"),
    ],
)
def test_a_variable_that_a_target_ignores_is_one_error(words: list[str], refused: str) -> None:
    said = ask_make(*words)
    assert said.returncode == 2
    assert refused in said.stderr
    assert said.stderr.count("\n") == 1


def test_variables_of_the_environment_end_no_target_that_does_not_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DATA": "glue", "TREES": "trees", "TASKS": "stsb", "LAUNCHER": "slurm"}.items():
        monkeypatch.setenv(name, value)
    options = ask_make("forgetting", "TEXTS=t", "DRY=1").stdout.partition("experiments.compare.forgetting")[2].split()
    forgetting._parser().parse_args(options)
    assert ask_make("reproduce-table3").stdout.split()[-3:] == ["--inherited", "DATA,TREES,LAUNCHER", "table3"]
    assert "--inherited TREES,LAUNCHER table3" in ask_make("reproduce-table3", "DATA=glue").stdout


def test_empty_variables_and_those_of_other_targets_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKERS", "4")
    for words in (["reproduce-table5", "METHODS="], ["search", "evidence", "BLOCK=2a"], ["report", "ARGS=--help"]):
        assert ask_make(*words).returncode == 0
