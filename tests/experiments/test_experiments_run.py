"""Tables as lists of runs: their cells, and that each is made only once however often it is requested."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, SHORT, TINY, environment

from experiments.reproduce import __main__ as runner
from experiments.reproduce import rates
from experiments.reproduce.cells import EXPERIMENTS, Cell, experiments_of, list_cells
from sparsegrad.errors import BusyError, UserError
from sparsegrad.files import write_json
from sparsegrad.runs.config import build
from sparsegrad.runs.run_folder import run_lock

SEEDS = 4


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with a rate for every method, and the search of full fine-tuning on SST-2."""
    chosen = {method: {"lr": 1e-3 * (index + 1)} for index, method in enumerate(rates.METHODS)}
    write_json(tmp_path / "results" / "mini_rates.json", {"methods": chosen})
    search = {
        "study": "evidence-minilm-full-sst2",
        "labels": {"model": "minilm", "method": "full", "task": "sst2"},
        "objective": "heldout",
        "budget": 8,
        "train_rest": True,
        "at_edge": False,
        "best": {"values": {"train.lr": 1e-3}},
        "trials": {"complete": 5, "pruned": 3},
    }
    write_json(tmp_path / "results" / "studies" / search["study"] / "summary.json", search)
    return tmp_path / "results"


@pytest.fixture
def overrides(results: Path, tmp_path: Path) -> list[str]:
    """Overrides that make the cells of evidence_paper tiny, and keep them in the test's folder."""
    small = [one for one in SHORT if not one.startswith("train.lr")]
    places = [f"results_dir={results}", f"work_dir={tmp_path / 'work'}"]
    return [*TINY, *small, *places, "train.precision=fp32", "protocol=paper", "method=full"]


@pytest.fixture
def cells(overrides: list[str]) -> list[Cell]:
    """Four tiny cells that differ in the seed."""
    return list_cells("evidence_paper", [*overrides, f"seed={','.join(map(str, range(SEEDS)))}"])


def complete(cell: Cell) -> None:
    """Stands in for a run: takes the lock and some time, and writes a record."""
    with run_lock(cell.config):
        time.sleep(0.2)
        record = {"schema": 1, "status": "complete", "config": cell.config.resolved}
        write_json(cell.config.record_path, record)
        with (Path(cell.config.work_dir) / "made").open("a") as log:
            log.write(f"{cell.label}\n")


def made(cells: list[Cell]) -> list[str]:
    return (Path(cells[0].config.work_dir) / "made").read_text().split("\n")[:-1]


def test_the_mini_cells_are_those_of_the_mini_yaml(conf: Any, overrides: list[str], results: Path) -> None:
    found = list_cells("table5_mini", [f"results_dir={results}", "seed=3705", "task=snippets,stsb"], data="somewhere")
    assert len(found) == 2 * 7
    assert len({cell.config.key for cell in found}) == len(found)
    cell = next(cell for cell in found if cell.label == "3705 stsb meprop")
    assert "data.dir=somewhere" in cell.overrides
    same = ["experiment=mini", "method=meprop", "task=stsb", "seed=3705", "train.lr=0.004"]
    assert build(conf(*same)).key == cell.config.key
    assert not any("data.dir" in text for cell in found if "snippets" in cell.label for text in cell.overrides)


def test_every_table_of_runs_composes(results: Path) -> None:
    every = {one for scale, names in EXPERIMENTS.items() for name in names for one in experiments_of(name, scale)}
    assert len(every) >= 9
    for experiment in every - {"table6", "table6_mini", "table6_mini_bases"}:  # on a task of their own
        searched = ["hparams=null"] if "evidence" in experiment else []  # their searches are made before
        narrow = ["seed=42", "task=stsb", *([f"results_dir={results}"] if "mini" in experiment else []), *searched]
        found = list_cells(experiment, narrow)
        assert len({cell.config.key for cell in found}) == len(found) >= 2, experiment
        models = {"table4": ["roberta_large"], "table9": ["bert_base"], "table5": ["bert_base", "roberta_base"]}
        if experiment in models:
            assert sorted({cell.config.model.name for cell in found}) == models[experiment]


def test_the_committed_records_are_the_cells_of_mini_table_6() -> None:
    found = [cell for name in experiments_of("table6", "mini") for cell in list_cells(name)]
    assert {cell.point["method"] for cell in found} == {"full", "lora", "meprop", "sparsegrad", "sparsegrad_fast"}
    assert len(found) == 15
    committed = {path.stem for path in (ROOT / "results" / "runs" / "table6_mini").glob("*.json")}
    assert {cell.config.key for cell in found} == committed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table99"], "table=table99 is not allowed: choose one of"),
        (["table4", "--scale", "huge"], "SCALE=huge is not allowed: choose one of paper, mini"),
        (["table4", "--launcher", "pigeon"], "LAUNCHER=pigeon is not allowed: choose one of local"),
        (["table4", "--dry", "method=magic"], "method=magic is not allowed: choose one of"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_failed_cell_stops_no_other_and_is_tried_again(cells: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    broken = [cells[1].label]

    def run(cell: Cell) -> str | None:
        if cell.label in broken:
            return "the loss is not a finite number"
        complete(cell)
        return None

    first = runner.work(cells, run)
    assert first.failed == {cells[1].label: "the loss is not a finite number"}
    assert first.done == SEEDS - 1
    assert "the loss is not a finite number (0.0 min)" in capsys.readouterr().out
    broken.clear()
    second = runner.work(cells, run)
    assert (second.done, second.failed) == (1, {})
    assert sorted(made(cells)) == sorted(cell.label for cell in cells)


def _worker(cells: list[Cell], results: Any) -> None:
    results.put(runner.work(cells, _completed, poll=0.05).done)


def _completed(cell: Cell) -> str | None:
    try:
        complete(cell)
    except BusyError:
        return f"run {cell.config.key} is at work in another process: wait for it, or stop it"
    return None


def test_two_processes_make_each_cell_once(cells: list[Cell]) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(cells, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(made(cells)) == sorted(cell.label for cell in cells)
    assert results.get() + results.get() == SEEDS


def test_a_cell_in_other_hands_is_taken_up_when_its_holder_fails(cells: list[Cell]) -> None:
    held = ExitStack()
    held.enter_context(run_lock(cells[0].config))
    order: list[str] = []

    def run(cell: Cell) -> str | None:
        order.append(cell.label)
        complete(cell)
        if len(order) == SEEDS - 1:
            held.close()
        return None

    assert runner.work(cells, run, poll=0.05).done == SEEDS
    assert order[-1] == cells[0].label


def test_kill_and_call_again_repeats_no_finished_cell(overrides: list[str], glue: Path, tmp_path: Path) -> None:
    command = [quick_python(), "-m", "experiments.reproduce", "table5", "--scale", "mini", "--data", str(glue)]
    command += [*overrides, "seed=1,2"]
    more: dict[str, Any] = {"cwd": tmp_path, "env": environment(PYTHONPATH=str(ROOT))}
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, **more)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(3)]  # the first began, it is done, the second began
    assert said[1].startswith("  done"), said
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: path.read_text() for path in (tmp_path / "results" / "runs").rglob("*.json")}
    assert len(before) == 1
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 2 cells complete, 1 of them by this call" in again.stdout
    after = {path: path.read_text() for path in (tmp_path / "results" / "runs").rglob("*.json")}
    assert len(after) == 2
    assert all(after[path] == text for path, text in before.items())
    seeds = [json.loads(text)["config"]["seed"] for text in after.values()]
    assert sorted(seeds) == [1, 2]


def test_dry_lists_what_exists_and_what_is_missing(
    overrides: list[str], cells: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "schema": 1,
        "status": "complete",
        "config": cells[0].config.resolved,
        "environment": {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:30:00+00:00"},
    }
    write_json(cells[0].config.record_path, record)
    failed = {**record, "status": "failed", "reason": "diverged", "config": cells[1].config.resolved}
    write_json(cells[1].config.record_path, failed)
    assert runner.main(["table5", "--scale", "mini", "--dry", *overrides, "seed=0,1,2,3"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 4 cells complete; about 1.5 hours left" in shown
    assert shown.splitlines()[-1].split() == ["minilm", "full", "sst2", "1", "1", "2", "1.50", "records"]


def test_what_needs_no_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("table1", "table2", "figure1"):
        assert runner.main([name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: ")
    assert runner.main(["figure2", "--dry", f"results_dir={tmp_path}"]) == 0
    assert "figure2.json is missing" in capsys.readouterr().out


def _record(method: str, task: str, rate: float, score: float | None) -> dict[str, Any]:
    config = {
        "method": {"name": method},
        "task": {"name": task},
        "train": {"lr": rate},
        "protocol": {"select": "heldout"},
    }
    status = {"status": "failed"} if score is None else {"status": "complete", "result": {"chosen_score": score}}
    return {"key": "k", "config": config, **status}


def grid(score: Callable[[str, float], float | None]) -> list[dict[str, Any]]:
    return [_record("full", task, rate, score(task, rate)) for task in rates.TASKS for rate in rates.RATES]


def test_the_rate_of_the_best_mean_wins_and_a_diverged_one_cannot() -> None:
    def score(task: str, rate: float) -> float | None:
        if rate == 5e-4:
            return None if task == "stsb" else 0.99
        return {5e-5: 0.8, 1.5e-4: 0.7}[rate] if task == "snippets" else {5e-5: 0.2, 1.5e-4: 0.4}[rate]

    chosen = rates.choose(rates.scores(grid(score)))["methods"]
    assert chosen["full"]["lr"] == 1.5e-4
    assert not chosen["full"]["at_edge"]
    assert chosen["full"]["mean"] == {"5e-05": 0.5, "0.00015": 0.55, "0.0005": None}
    assert chosen["lora"]["lr"] is None
    assert len(chosen["lora"]["missing"]) == 6


@pytest.mark.parametrize(("tasks", "best", "at_edge"), [(("stsb",), 5e-4, True), (rates.TASKS, 1.5e-3, True)])
def test_a_rate_beyond_the_grid_counts_once_all_tasks_have_it(
    tasks: tuple[str, ...], best: float, at_edge: bool
) -> None:
    further = [_record("full", task, 1.5e-3, 1.0) for task in tasks]
    chosen = rates.choose(rates.scores([*grid(lambda _, rate: 1000 * rate), *further]))["methods"]["full"]
    assert (chosen["lr"], chosen["at_edge"]) == (best, at_edge)


def test_disagreeing_records_and_validation_scores_are_refused() -> None:
    twice = [_record("full", "stsb", 5e-5, 0.5), _record("full", "stsb", 5e-5, 0.6)]
    with pytest.raises(UserError, match="two records for full / stsb at 5e-05 disagree"):
        rates.scores(twice)
    wrong = _record("full", "stsb", 5e-5, 0.5)
    wrong["config"]["protocol"]["select"] = "validation"
    with pytest.raises(UserError, match="chosen on validation rows"):
        rates.scores([wrong])
