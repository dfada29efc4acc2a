"""Tables without runs of cells: benchmark presets and sweeps are listed, made, and not made twice."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import FAKE_SWEEP, ROOT

from experiments.bench.presets import Planned
from experiments.bench.results import empty, find_cell, put_cell, read
from experiments.bench.settings import Setting
from experiments.reproduce import __main__ as runner
from experiments.reproduce import benchmarks, search_all, searches
from experiments.reproduce.processes import EndedJob, Job
from experiments.reproduce.search import compose_sweep
from experiments.studies import gradients as measure
from sparsegrad.files import write_json
from sparsegrad.sweeps.pool import run_sweep

SETTING = Setting(shape="minilm", blocks=1, batch=2, length=8, padding="none")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fake benchmark of two arms and three repeats; returns the list of its calls and measurements."""
    asked: list[str] = []

    def call(preset: str, path: Path) -> None:
        asked.append(preset)
        document = read(path)
        for repeat in range(3):
            for arm in ("full", "lora_peft"):
                if find_cell(document, SETTING.key, arm, repeat) is None:
                    asked.append(f"{arm} {repeat}")
                    put_cell(document, measured(arm, repeat))
        write_json(path, document)

    planned = [Planned(preset="paper", setting=SETTING, arms=("full", "lora_peft"))]
    monkeypatch.setattr(benchmarks, "plan", lambda *_, **__: planned)
    monkeypatch.setattr(benchmarks, "arms_of", lambda setting, arms: list(arms))
    monkeypatch.setattr(benchmarks, "call", call)
    return asked


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Path]]:
    """Name, scale and results folder of each table that would be written."""
    found: list[tuple[str, str, Path]] = []
    monkeypatch.setattr(runner, "write_report", lambda *given: found.append(given))
    return found


def measured(arm: str, repeat: int) -> dict[str, Any]:
    cell = {"setting": SETTING.key, "arm": arm, "repeat": repeat, "status": "complete", "peak_mib": 1.0}
    return {**cell, "steps": 50, "warmup_steps": 20, "steps_per_second": 7.0}


@pytest.mark.parametrize("table", ["table3", "table7", "table8"])
def test_speed_tables_measure_what_is_missing(
    table: str, calls: list[str], shown: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"results_dir={tmp_path}"
    assert runner.main([table, "--dry", where]) == 0
    assert "paper: 0 of 6 measurements complete" in capsys.readouterr().out
    assert calls == shown == [], "dry measures nothing"
    assert runner.main([table, where]) == 0
    assert shown == [(table, "paper", tmp_path)], "from the folder of its measurements"
    assert calls.count("paper") == 1
    assert runner.main([table, where]) == 0
    assert calls.count("paper") == 1, "what is complete is not measured again"


def test_a_failed_measurement_is_shown_and_tried_again(
    calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = benchmarks._path(tmp_path)
    failed = [{**measured("lora_peft", repeat), "status": "failed", "reason": "no peft"} for repeat in range(3)]
    write_json(path, {**empty(), "cells": [*(measured("full", repeat) for repeat in range(3)), *failed]})
    assert benchmarks.make("paper", tmp_path, dry=True) == 0
    shown = capsys.readouterr().out
    assert "3 of 6 measurements complete; about 1 minutes left" in shown  # 3 of 10 s and 70 steps at 7 a second
    assert benchmarks.make("paper", tmp_path, dry=False) == 0
    assert [one for one in calls if one.startswith("full")] == [], "finished cells stay"
    assert sorted(one for one in calls if one.startswith("lora")) == [f"lora_peft {n}" for n in range(3)]


def test_what_fails_again_ends_with_its_table_and_status_1(
    calls: list[str],
    shown: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmarks, "call", lambda preset, path: None)
    assert runner.main(["table7", f"results_dir={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert "full: not measured yet; the next call tries it again" in said.out
    assert shown == [("table7", "paper", tmp_path)]
    assert "not complete: what failed or is left stands above the tables" in said.err


@pytest.mark.parametrize(("table", "is_shown"), [("figure2", False), ("quality", True)])
def test_a_refused_measurement_leaves_the_table_to_the_other_parts(
    table: str, is_shown: bool, shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "main", lambda _: 2)
    monkeypatch.setattr(runner.evidence, "plan_cells", lambda *_, **__: [])
    monkeypatch.setattr(runner, "_group", lambda *_: 0)
    assert runner.main([table, "--scale", "mini", f"results_dir={tmp_path}"]) == 2
    assert bool(shown) is is_shown


def test_an_interrupted_call_ends_without_a_table(
    calls: list[str], shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "call", stop)
    assert runner.main(["table7", f"results_dir={tmp_path}"]) == 130
    assert shown == []


def test_the_benchmark_takes_no_overrides_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["table3", "seed=3", f"results_dir={tmp_path}"]) == 2
    assert "table3 takes no seed=3: it is one preset of the benchmark" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides for a search of three trials on a function without a model."""
    fake = [one for one in FAKE_SWEEP if not one.startswith(("sweep=", "sweep.study=", "sweep.space=", "task="))]
    places = [f"results_dir={tmp_path / 'results'}", f"work_dir={tmp_path / 'work'}"]
    return [*fake, *places, "evidence.budget=3", "protocol.patience=null"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would be started."""
    asked: list[list[str]] = []

    def call(command: Sequence[str]) -> None:
        asked.append(list(command))

    monkeypatch.setattr(searches, "call", call)
    return asked


def test_tables_13_to_15_are_one_study_a_task(tmp_path: Path) -> None:
    found = searches.planned_searches("table15", "paper", None, [f"results_dir={tmp_path}"])
    assert [one.study for one in found][:2] == ["paper-roberta_base-full-stsb", "paper-roberta_base-full-cola"]
    assert len(found) == 8
    assert all(one.plan.budget == 40 for one in found)
    mini = searches.planned_searches("table13", "mini", "somewhere", [f"results_dir={tmp_path}"])
    assert [one.study for one in mini] == [
        f"evidence-minilm-sparsegrad-{task}" for task in ("stsb", "mrpc", "sst2", "cola")
    ]
    assert all("data.dir=somewhere" in one.overrides for one in mini)
    assert {one.plan.budget for one in mini} == {8}


def test_a_search_is_listed_run_exported_and_not_repeated(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Job] = []
    works = False

    def run_jobs(jobs: Iterable[Job], workers: int, is_needed: Callable[[Job], bool], *_: Any, **__: Any) -> Any:
        for job in filter(is_needed, jobs):
            started.append(job)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("error: a mistake")
            if works:
                run_sweep(compose_sweep(job.command[2:]), {})
            yield EndedJob(job=job, status=0, minutes=0.0)

    monkeypatch.setattr(search_all, "run_jobs", run_jobs)
    (tmp_path / "mrpc").mkdir()
    arguments = ["table13", "--scale", "mini", "--data", str(tmp_path), "task=mrpc", *small]
    assert runner.main([*arguments, "--dry"]) == 0
    assert "0 of 1 studies complete" in capsys.readouterr().out
    assert started == []
    assert runner.main(arguments) == 1
    assert "evidence-minilm-sparsegrad-mrpc: 0 of 3 trials" in capsys.readouterr().out
    folder = tmp_path / "results" / "studies" / "evidence-minilm-sparsegrad-mrpc"
    assert [Path(one.command[1]).name for one in started] == ["run.py"]
    assert not folder.exists(), "without a trial there is nothing to export"
    works = True
    assert runner.main(arguments) == 0
    assert len(started) == 2
    assert json.loads((folder / "summary.json").read_text())["labels"]["method"] == "sparsegrad"
    assert (folder / "history.png").is_file()
    assert runner.main(arguments) == 0
    assert len(started) == 2, "a finished study is left alone"
    (tmp_path / "results" / "studies" / "studies.db").unlink()
    assert runner.main(arguments) == 0
    assert len(started) == 2, "its summary is enough"


def test_a_launcher_gets_one_job_a_study(commands: list[list[str]], tmp_path: Path) -> None:
    for task in ("stsb", "mrpc", "sst2", "cola"):
        (tmp_path / task).mkdir()
    arguments = [
        "table14",
        "--scale",
        "mini",
        "--data",
        str(tmp_path),
        "--launcher",
        "joblib",
        f"results_dir={tmp_path}",
    ]
    assert runner.main(arguments) == 1
    assert all(one[1:3] == [str(ROOT / "run.py"), "-m"] and "hydra/launcher=joblib" in one for one in commands)
    (command,) = commands
    assert {f"data.dir={tmp_path}", "task=stsb,mrpc,sst2,cola", "hydra.sweeper.params=null"} <= set(command)
    assert "hydra.mode=RUN" not in command, "a launcher needs a multirun"


def test_tasks_can_be_narrowed_and_a_wrong_one_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"results_dir={tmp_path}"
    found = searches.planned_searches("table13", "paper", None, ["task=cola,rte", where])
    assert [one.plan.base.task.name for one in found] == ["cola", "rte"]
    assert runner.main(["table13", "--dry", "task=magic", where]) == 2
    assert "task=magic is not allowed: choose one of" in capsys.readouterr().err


def test_all_is_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(searches, "TABLES", {"table15": ("roberta_base", "full")})
    monkeypatch.setattr(runner, "experiments_of", lambda name, scale: ())  # the hundreds of runs are listed elsewhere
    assert runner.main(["all", "--dry", "seed=42", f"results_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    for said in ("figure2: ", "paper: 0 of ", "decomposition: 0 of ", "paper-roberta_base-full-rte"):
        assert said in shown


def test_another_block_of_a_figure_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(measure, "main", lambda arguments: asked.append(arguments) or 0)
    path = tmp_path / "figures" / "figure2.json"
    write_json(path, {"block": 3, "step": 80})
    where = f"results_dir={tmp_path}"
    assert runner.main(["figure2", where, "block=3"]) == 0
    assert asked == []
    assert runner.main(["figure2", where, "block=1", "step=40"]) == 0
    assert asked == [["figure2", "--block=1", "--step=40", where]]
    assert runner.main(["figure2", where, "force=true"]) == 0
    assert len(asked) == 2


def test_a_figure_that_cannot_be_read_now_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    asked: list[Any] = []
    monkeypatch.setattr(measure, "main", lambda arguments: asked.append(arguments) or 0)
    monkeypatch.setattr(runner, "load_json", fail)
    write_json(tmp_path / "figures" / "figure2.json", {"block": 3, "step": 80})
    assert runner.main(["figure2", f"results_dir={tmp_path}"]) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "other"),
    [
        (["figure2"], ""),
        (["figure2", "--data", "glue"], ""),
        (["figure2", "task=snippets"], "task=sst2, not snippets"),
        (["figure2", "model=mpnet_base"], "model=minilm, not mpnet_base"),
        (["figure2", "seed=7"], "seed=42, not 7"),
        (["figure2", "train.lr=1e-3"], "lr=0.0001, not 0.001"),
        (["quality", "--scale", "mini", "seed=7,8"], ""),  # its runs take these seeds
    ],
)
def test_a_figure_of_other_settings_is_measured_again(
    arguments: list[str],
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner.evidence, "plan_cells", lambda *_, **__: [])
    monkeypatch.setattr(runner, "_group", lambda *_: 0)
    facts = {"model": "minilm", "task": "sst2", "batch_size": 16, "lr": 1e-4, "seed": 42, "block": 3, "step": 80}
    for name in ("figure2", "energy"):
        write_json(tmp_path / "figures" / f"{name}.json", facts)
    assert runner.main([*arguments, "--dry", f"results_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert other in said
    assert said.rstrip().endswith("exists") is (not other)
