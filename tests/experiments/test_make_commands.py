"""The `make` commands in messages can be typed as they stand; two calls of one job write two logs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from run_fixtures import ROOT

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


def test_only_plans_with_trees_call_them_so() -> None:
    assert [name_of_place(one, "oasst1") for one in ("evidence_smollm2", "table6_mini")] == ["TREES", "DATA"]
    assert name_of_place("compare", "stsb") == "DATA"


def test_two_calls_do_not_share_a_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = log_path(str(tmp_path), "key")
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert log_path(str(tmp_path), "key") != first


@pytest.mark.parametrize(("target", "scale"), [("search", "mini"), ("compare", "mini"), ("reproduce-table5", "paper")])
def test_searches_and_comparisons_are_of_the_small_models_by_default(target: str, scale: str) -> None:
    def words(*given: str) -> str:
        command = ["make", "--dry-run", "--old-file=pyproject.toml", "--old-file=constraints.txt", target, *given]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert f"--scale {scale} " in words()
    assert "--scale other " in words("SCALE=other")
