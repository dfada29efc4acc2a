"""Searches of the evidence as a command: equal budgets, resumable, nothing twice; and the rates that runs use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evidence_commands import FAKE, lose_hub
from evidence_commands import empty_glue as empty_glue  # the fixtures
from evidence_commands import places as places  # the fixtures
from evidence_commands import results as results
from quick_python import quick_python
from run_fixtures import ROOT, TINY

from experiments.reproduce import search_all
from experiments.reproduce.cells import list_cells
from experiments.reproduce.processes import EndedJob
from sparsegrad import progress
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.runs.plan import plan_hash
from sparsegrad.sweeps.search_way import study_name

PYTHON = sys.executable
PLAN = ROOT / "conf" / "experiment" / "evidence_paper.yaml"


def summary(method: str, lr: float, **other: Any) -> dict[str, Any]:
    """The exported summary of a finished search on MiniLM and CoLA."""
    name = study_name("minilm", method, "cola", other.get("train_rest", True))
    return {
        "study": name,
        "labels": {"model": "minilm", "method": method, "task": "cola"},
        "objective": "heldout",
        "budget": 8,
        "train_rest": True,
        "at_edge": False,
        "best": {"values": {"train.lr": lr}},
        "trials": {"complete": 5, "pruned": 3},
        **other,
    }


def store(results: Path, found: dict[str, Any], name: str | None = None) -> Path:
    path = results / "studies" / (name or found["study"]) / "summary.json"
    write_json(path, found)
    return path


def test_a_search_runs_with_equal_budgets_and_its_rates_are_used(
    results: Path, places: list[str], empty_glue: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--methods", "lora,meprop", "--tasks", "mrpc", *FAKE, *places]
    assert search_all.main([*chosen, "--data", "nowhere", "--dry"]) == 0
    shown = capsys.readouterr()
    assert "0 of 2 studies complete" in shown.out
    assert "nowhere does not exist" in shown.err, "a listing reads no data, but says what the runs would"
    given = [*chosen, "--data", empty_glue]
    assert search_all.main(given) == 0
    said = capsys.readouterr().out
    assert "search evidence-minilm-lora-mrpc: finished in" in said
    for method in ("lora", "meprop"):
        found = json.loads((results / "studies" / f"evidence-minilm-{method}-mrpc" / "summary.json").read_text())
        assert found["budget"] == 8 == found["trials"]["complete"] + found["trials"]["pruned"]
        assert (found["train_rest"], found["at_edge"]) == (True, False)
    record = json.loads(next((results / "runs" / "evidence-minilm-lora-mrpc").glob("*.json")).read_text())
    assert record["plan"] == {"experiment": "evidence_paper", "sha256": plan_hash(PLAN)}
    assert search_all.main(given) == 0
    assert "finished in" not in capsys.readouterr().out, "a finished search is left alone"
    (results / "studies" / "studies.db").unlink()
    assert search_all.main(given) == 0
    assert "finished in" not in capsys.readouterr().out, "its summary is enough"
    cells = list_cells("evidence_paper", [*TINY, places[0], "task=mrpc", "method=lora,meprop", "seed=42"])
    assert [cell.config.train.lr for cell in cells] == [1e-3, 1e-3], "the stand-in is best there"


def test_a_killed_search_continues_where_it_stopped(
    results: Path, places: list[str], empty_glue: str, tmp_path: Path
) -> None:
    slow = ["protocol.patience=400"]  # milliseconds of a run of the stand-in
    command = [quick_python(), "-m", "experiments.reproduce.search_all", "--methods", "full", "--tasks", "mrpc"]
    command += ["--data", empty_glue, *FAKE, *places, *slow]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    runs = results / "runs"
    end = time.monotonic() + 90
    while len(list(runs.rglob("*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json")}
    assert 2 <= len(before) < 8
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json")}
    assert len(after) == 8, "the trials of the search"
    assert all(after[path] == stamp for path, stamp in before.items()), "no finished trial is repeated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "make reproduce-table13"),
        (["--methods", "magic"], "METHODS=magic is not allowed: choose one of full, lora"),
        (["--tasks", "rte"], "TASKS=rte is not allowed: choose one of stsb"),
        (["--tasks", "oasst1", "--dry"], "TASKS=oasst1 needs TREES=<file of conversation trees>"),
        (
            ["--methods", "static_mask", "--tasks", "mrpc"],
            "no plan has METHODS=static_mask on TASKS=mrpc: choose TASKS of stsb, sst2, cola",
        ),
        (["--methods", "lora", "method=full"], "METHODS=lora and ARGS=method=full exclude each other"),
        (["--methods", "lora", "seed=42"], "seed=42 is not allowed for a search: all use the same seed"),
        (["--workers", "0"], "WORKERS=0"),
        (["--data", "nowhere"], "DATA=nowhere does not exist: give the folder with GLUE"),
        (["--trees", "nowhere"], "TREES=nowhere does not exist: give the file of conversation trees"),
        (["--data", ".", "--tasks", "cola"], "DATA=. has no cola: put its files into cola or CoLA"),
        (["sweep.trials=0"], "sweep.trials=0"),
        (["sweep.pruner=none"], "sweep.pruner=none is not allowed here: the searches of all methods are made alike"),
        (["sweep.pruner_warmup=1"], "sweep.pruner_warmup=1 is not allowed"),
        (["sweep.sampler=tpe"], "sweep.sampler=tpe is not allowed"),
        (["sweep.objective=validation"], "sweep.objective=validation is not allowed"),
        (["+sweep.metric=loss"], "sweep.metric=loss is not allowed"),
    ],
)
def test_bad_input_of_a_search_is_one_line(
    arguments: list[str], message: str, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_all.main([*arguments, *places]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_search_of_another_budget_is_refused(
    results: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store(results, summary("lora", 1e-4, budget=6, trials={"complete": 6, "pruned": 0}))
    assert search_all.main(["--methods", "lora", "--tasks", "cola", *places]) == 2
    error = capsys.readouterr().err
    assert "search evidence-minilm-lora-cola: its budget is 6, not 8: all methods need the same" in error
    assert (
        f'anew with make search SCALE=mini METHODS=lora TASKS=cola ARGS="{" ".join(places)} sweep.overwrite=' in error
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 6}, "has a budget of 6 trials, this plan one of 8"),
        ({"trials": {"complete": 5, "pruned": 1}}, "has 6 of 8 trials"),
        ({"train_rest": False}, r"another regime \(train\.train_rest=False, this run has True\)"),
        ({"objective": "validation"}, "chosen on validation rows"),
        ({"labels": {"model": "minilm", "method": "full", "task": "cola"}}, "is of minilm / full / cola"),
        ({"best": {}}, "is not a summary of a search"),
        ({"budget": None}, "has a budget of None trials"),
    ],
)
def test_a_search_that_does_not_fit_is_refused_by_name(
    change: dict[str, Any], message: str, results: Path, places: list[str]
) -> None:
    store(results, {**summary("lora", 1e-4), **change}, "evidence-minilm-lora-cola")
    one = ["method=lora", "task=cola", "seed=42", places[0]]
    with pytest.raises(UserError, match=f"(?s)evidence-minilm-lora-cola.*{message}.*make search"):
        list_cells("evidence_paper", one)


def test_a_worker_that_fails_is_told_apart_from_its_reason_in_the_words_of_make(
    places: list[str], empty_glue: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(jobs: Any, *_: Any, **__: Any) -> Iterator[EndedJob]:
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text(
                "error: data.dir=x has no complete mrpc; put the files there, use the hub with data.dir=null\n"
            )
            yield EndedJob(job=job, status=2, minutes=0.2)

    monkeypatch.setattr(search_all, "run_jobs", fail)
    given = ["--methods", "lora,full", "--tasks", "mrpc", "--data", empty_glue, *places]
    assert search_all.main(given) == 1
    said = "stopped after 0.2 min, 8 of 8 trials left: DATA=x has no complete mrpc; put the files there, use the hub "
    assert f"search evidence-minilm-full-mrpc: {said}without DATA\n" in capsys.readouterr().out


def test_the_folder_of_one_task_is_no_data(
    places: list[str], empty_glue: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_all.main(["--methods", "lora", "--data", f"{empty_glue}/cola", "--tasks", "cola", *places]) == 2
    assert f"is the folder of one task: give the one above it, DATA={empty_glue}\n" in capsys.readouterr().err


def test_without_the_hub_one_search_of_a_task_fails(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = lose_hub(search_all, monkeypatch)
    assert search_all.main(["--methods", "lora,full", "--tasks", "mrpc,cola", *places]) == 1
    assert started == ["evidence-minilm-full-mrpc", "evidence-minilm-full-cola"]
    assert "left: search evidence-minilm-lora-mrpc: 0 of 8 trials" in capsys.readouterr().out


def test_a_missing_search_and_a_budget_of_zero_are_refused(results: Path, places: list[str]) -> None:
    one = ["method=lora", "task=cola", "seed=42", places[0]]
    with pytest.raises(UserError, match=r"evidence-minilm-lora-cola is missing.*METHODS=lora TASKS=cola"):
        list_cells("evidence_paper", one)
    store(results, summary("lora", 1e-4))
    with pytest.raises(UserError, match=r"evidence\.budget=0"):
        list_cells("evidence_paper", [*one, "evidence.budget=0"])
    with pytest.raises(UserError, match="evidence_mlp_only-minilm-lora_tuned-cola is missing"):
        list_cells("evidence_mlp_only", ["method=lora_tuned", "task=cola", "seed=42", places[0]])


def test_a_rate_is_carried_to_a_larger_model_as_a_multiple_of_fulls(results: Path, places: list[str]) -> None:
    store(results, summary("full", 1e-4))
    store(results, summary("meprop", 3.16e-4))
    cells = list_cells("evidence_base", ["method=full,meprop", "task=cola", "seed=42", places[0]])
    assert [cell.config.train.lr for cell in cells] == [3e-5, 9.48e-5]


def test_bases_share_the_rate_of_the_method(results: Path, places: list[str]) -> None:
    labels = {"model": "minilm", "method": "sparsegrad", "task": "stsb"}
    name = "evidence_mlp_only-minilm-sparsegrad-stsb"
    store(results, summary("sparsegrad", 5e-4, train_rest=False, study=name, labels=labels))
    cells = list_cells("evidence_basis", ["task=stsb", "seed=42", places[0]])
    assert [cell.config.method.basis for cell in cells] == ["hosvd", "authors", "random", "none"]
    assert {cell.config.train.lr for cell in cells} == {5e-4}


def test_the_rates_need_no_optuna(results: Path, places: list[str]) -> None:
    store(results, summary("lora", 1e-4))
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "from hydra import compose, initialize_config_dir\n"
        "from sparsegrad.sweeps import hparams\n"
        f"with initialize_config_dir({str(ROOT / 'conf')!r}, version_base='1.3'):\n"
        f"    composed = compose('config', ['experiment=evidence_paper', 'method=lora', 'task=cola', {places[0]!r}])\n"
        "print(hparams.apply(composed))\n"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    found = (
        "{'from': 'search', 'study': 'evidence-minilm-lora-cola', 'budget': 8, 'at_edge': False, 'train.lr': 0.0001}"
    )
    assert done.stdout.strip() == found


def test_the_trials_of_a_running_search_are_counted(
    places: list[str], empty_glue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study takes its worker hours: the line of progress must not wait for its end."""
    left, shown = [8, 8, 7, 5, 5, 5], []

    def waits(*arguments: Any, **_: Any) -> Iterator[Any]:
        for _ in range(3):
            arguments[-1]()
        yield from ()

    monkeypatch.setattr(search_all, "COUNT_SECONDS", 0.0)
    monkeypatch.setattr(search_all, "_count_left", lambda _: left.pop(0))
    monkeypatch.setattr(search_all, "run_jobs", waits)
    monkeypatch.setattr(progress.Job, "update", lambda *_, done, **__: shown.append(done))
    assert search_all.main(["--methods", "full", "--tasks", "mrpc", "--data", empty_glue, *FAKE, *places]) == 1
    assert shown == [0, 1, 3]
