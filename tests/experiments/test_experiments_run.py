"""Tables as lists of runs: their cells, and that each is made only once however often it is requested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, SHORT, TINY, environment

from experiments.paths import CONF
from experiments.reproduce import __main__ as runner
from experiments.reproduce import evidence
from experiments.reproduce.cells import EXPERIMENTS, OF_TREES, Cell, experiments_of, list_cells
from sparsegrad.files import write_json
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import build
from sparsegrad.sweeps import search_way

SEEDS = 4


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with the search of full fine-tuning on SST-2."""
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


def test_the_cells_of_a_table_are_those_of_its_yaml(conf: Any) -> None:
    short = ["hparams=null", "protocol.epochs=1", "protocol.eval_steps=9", "data.max_train=null"]
    found = list_cells("evidence_paper", [*short, "seed=3705", "task=snippets,stsb"], data="somewhere")
    assert len(found) == 2 * 8
    assert len({cell.config.key for cell in found}) == len(found)
    cell = next(cell for cell in found if cell.config.method.name == "meprop" and cell.config.task.name == "stsb")
    assert "data.dir=somewhere" in cell.overrides
    same = ["experiment=evidence_paper", *short, "method=meprop", "task=stsb", "seed=3705"]
    assert build(conf(*same)).key == cell.config.key
    assert not any("data.dir" in text for cell in found if "snippets" in cell.label for text in cell.overrides)


def test_every_table_of_runs_composes() -> None:
    every = {one for scale, names in EXPERIMENTS.items() for name in names for one in experiments_of(name, scale)}
    assert len(every) >= 9
    for experiment in every - {"table6", "table6_mini", "table6_mini_bases"}:  # on a task of their own
        searched = ["hparams=null"] if "evidence" in experiment else []  # their searches are made before
        found = list_cells(experiment, ["seed=42", "task=stsb", *searched])
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
        (["table99"], "figure1, figure2, figure3, quality, section8, table1, table2, table3, "),
        (["table4", "--scale", "huge"], "SCALE=huge is not allowed: choose one of paper, mini"),
        (["table4", "--launcher", "pigeon"], "LAUNCHER=pigeon is not allowed: choose one of local"),
        (["table4", "--dry", "method=magic"], "method=magic is not allowed: choose one of"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_kill_and_call_again_repeats_no_finished_cell(overrides: list[str], glue: Path, tmp_path: Path) -> None:
    command = [quick_python(), "-m", "experiments.reproduce", "table5", "--scale", "mini", "--data", str(glue)]
    command += [*overrides, "seed=1,2"]
    more: dict[str, Any] = {"cwd": tmp_path, "env": environment(PYTHONPATH=str(ROOT))}
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, **more)
    assert process.stdout is not None
    said = next(line for line in process.stdout if ": done (" in line)  # the first, so that the second begins
    assert "1 cells left" in said
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
    assert "exploratory" in (tmp_path / "results" / "tables" / "evidence_paper.md").read_text()


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
    quick = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:36+00:00"}
    elsewhere = {**record, "environment": quick, "memory": {"device": "another"}, "config": cells[1].config.resolved}
    write_json(cells[1].config.record_path, elsewhere)
    assert runner.main(["table5", "--scale", "mini", "--dry", *overrides, "seed=0,1,2,3"]) == 0
    assert "2 of 4 cells complete; about 1.0 hours left" in capsys.readouterr().out, "runs of another device count last"
    cells[0].config.record_path.unlink()
    assert runner.main(["table5", "--scale", "mini", "--dry", *overrides, "seed=0,1,2,3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-3:] == ["0.03", "another", "device"]


def test_dry_lists_runs_that_wait_for_a_search_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["task=stsb", "method=lora", "seed=42,37", f"results_dir={tmp_path}"]
    data = ["--data", str(tmp_path)]
    command = f"make search SCALE=mini DATA={tmp_path} METHODS=lora TASKS=stsb ARGS=results_dir={tmp_path} fills"
    assert runner.main(["table5", "--scale", "mini", "--dry", *data, *given]) == 0
    shown = capsys.readouterr()
    assert (
        "2 of 2 cells wait for 1 search: hparams=search: the search evidence-minilm-lora-stsb is missing" in shown.out
    )
    assert command in shown.out
    assert "0 of 2 cells complete" in shown.out
    assert f"DATA={tmp_path} has no stsb" in shown.err

    assert runner.main(["table5", "--scale", "mini", *data, *given]) == 2
    assert f"DATA={tmp_path} has no stsb" in capsys.readouterr().err, "before the searches that it would need"
    (tmp_path / "STS-B").mkdir()
    assert runner.main(["table5", "--scale", "mini", *data, *given]) == 2
    assert command in capsys.readouterr().err
    assert runner.main(["table5", "--scale", "mini", "--data", str(tmp_path / "nowhere"), *given]) == 2
    assert "nowhere does not exist: give the folder with GLUE" in capsys.readouterr().err


def test_complete_runs_are_listed_with_any_data_and_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda _: "other")
    (tmp_path / "stsb").mkdir()
    given = ["2a", "--data", str(tmp_path), "--tasks", "stsb", "--methods", "lora"]
    for dry in ([], ["--dry"]):
        assert evidence.main([*given, *dry]) == 0
        assert "3 of 3 cells complete" in capsys.readouterr().out
    assert evidence.main([*given, "--dry", "seed=42,37"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 cells complete" in shown
    assert "1 of 2 cells waits for 1 search: hparams=search: evidence-minilm-lora-stsb: its data has" in shown
    assert "give the data of the search as DATA=; or make search SCALE=mini" in shown
    assert "ARGS=results_dir=FOLDER searches this data, for runs in FOLDER" in shown
    assert evidence.main([*given, "seed=42,37"]) == 2
    assert evidence.main([*given, "--dry", "force=true"]) == 0
    assert "3 of 3 cells wait" in capsys.readouterr().out


def test_what_needs_no_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"results_dir={tmp_path}"
    for name in ("table1", "table2", "figure1"):
        assert runner.main([name, where]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: ")
    assert (tmp_path / "tables" / "table1.md").is_file()
    assert (tmp_path / "figures" / "figure1-light.svg").is_file()
    assert runner.main(["figure2", "--dry", where]) == 0
    assert "figure2.json is missing" in capsys.readouterr().out


def test_table_6_reads_trees_and_the_other_tables_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str | None] = {}

    def plan(name: str, _: Any, data: str | None, **__: Any) -> list[Cell]:
        found[name] = data
        return []

    monkeypatch.setattr(runner.evidence, "plan_cells", plan)
    monkeypatch.setattr(runner, "_group", lambda *_: 0)
    monkeypatch.setattr(runner, "_plan_studies", lambda _: [])
    monkeypatch.setattr(runner, "_measure", lambda *_, **__: 0)
    given = ["--scale", "mini", "--dry", f"results_dir={tmp_path}"]
    assert runner.main(["all", *given, "--data", "glue", "--trees", "trees"]) == 0
    assert found == {name: "trees" if name in OF_TREES else "glue" for name in experiments_of("all", "mini")}
    assert runner.main(["all", *given, "--data", "glue"]) == 0
    assert found["table6_mini"] is None, "the hub's conversations, not the folder with GLUE"
    for option in ("--trees", "--data"):
        assert runner.main(["table6", *given, option, "trees"]) == 0
        assert found["table6_mini"] == "trees"


def test_the_experiments_on_conversations_are_known() -> None:
    every = {one for scale in EXPERIMENTS for one in experiments_of("all", scale)}
    tasks = {one: compose_run([f"experiment={one}"], CONF).task.name for one in every}
    assert {name for name, task in tasks.items() if task == "oasst1"} == set(OF_TREES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table5", "--trees", "trees"], "table5 at SCALE=paper reads no conversations: leave out TREES"),
        (["table6", "--trees", "trees", "--data", "glue"], "table6 does not read GLUE: leave out DATA"),
        (["table3", "--data", "glue"], "table3 does not read GLUE: leave out DATA"),
        (["table3", "--launcher", "slurm"], "table3 has nothing that LAUNCHER=slurm could start: leave it out"),
        (["table3", "--data", "glue", "--inherited", "TREES"], "table3 does not read GLUE: leave out DATA"),
    ],
)
def test_what_a_table_would_ignore_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main([*arguments, "--dry", f"results_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("table", ["table3", "table4", "table6", "figure1"])
def test_what_the_environment_has_for_other_tables_is_left_out(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_plan_studies", lambda _: [])
    places = ["--data", str(tmp_path), "--trees", str(tmp_path), "--launcher", "slurm"]
    inherited = ["--inherited", "DATA,TREES,LAUNCHER"]
    assert runner.main([table, "--dry", *places, *inherited, f"results_dir={tmp_path}"]) == 0
