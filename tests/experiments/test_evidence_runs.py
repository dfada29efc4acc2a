"""Runs of the evidence as a command: complete, resumable, and nothing twice."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from evidence_commands import lose_hub
from evidence_commands import places as places  # the fixtures
from evidence_commands import results as results
from run_fixtures import ROOT, SHORT, TINY

from experiments.reproduce import evidence, making
from experiments.reproduce.cells import Cell, list_cells
from experiments.reproduce.counting import Watch
from experiments.reproduce.processes import EndedJob, Job, cell_job, explain_end, last_error, run_jobs
from sparsegrad.files import write_json
from sparsegrad.runs.plan import plan_hash


@pytest.fixture
def cells(places: list[str], glue: Path) -> list[Cell]:
    """Four tiny cells of block 0."""
    small = [one for one in SHORT if not one.startswith("train.lr")]
    given = [*TINY, *small, *places, "train.lr=1e-3,2e-3,3e-3,4e-3", "train.precision=fp32"]
    return list_cells("evidence_gates", given, str(glue))


def lock_of(cell: Cell) -> Path:
    """The file that a run locks."""
    return Path(cell.config.work_dir) / "locks" / f"{cell.config.key}.lock"


@pytest.fixture
def quick(cells: list[Cell], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Cells that only take half a second and write their record; a folder with a note of each start."""
    notes = tmp_path / "notes"
    notes.mkdir()
    script = tmp_path / "cell.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "from filelock import FileLock, Timeout\n"
        "number, record, text, notes, lock, force = sys.argv[1:]\n"
        "held = FileLock(lock)\n"
        "try: held.acquire(timeout=0)\n"
        "except Timeout: sys.exit(75)\n"
        "if pathlib.Path(record).exists() and force != 'True': sys.exit()\n"
        "(pathlib.Path(notes) / f'{number}-{time.monotonic_ns()}').touch()\n"
        "time.sleep(0.5)\n"
        "if (pathlib.Path(notes) / f'broken{number}').exists(): sys.exit('error: the loss is not a finite number')\n"
        "path = pathlib.Path(record); path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)\n"
    )
    numbers = {cell.label: number for number, cell in enumerate(cells)}

    def job(cell: Cell) -> Job:
        stamps = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T01:00:00+00:00"}
        record = {"schema": 1, "status": "complete", "config": cell.config.resolved, "environment": stamps}
        command = [sys.executable, str(script), str(numbers[cell.label]), str(cell.config.record_path)]
        command += [json.dumps(record), str(notes), str(lock_of(cell)), str(cell.config.force)]
        return Job(label=cell.label, command=tuple(command), log=tmp_path / f"{numbers[cell.label]}.log")

    monkeypatch.setattr(making, "cell_job", job)
    return notes


def with_force(cell: Cell) -> Cell:
    return replace(cell, overrides=(*cell.overrides, "force=true"), config=replace(cell.config, force=True))


def starts(notes: Path) -> list[str]:
    return sorted(path.name[0] for path in notes.glob("?-*"))


def test_each_cell_is_made_once_with_a_line_and_the_remaining_hours(
    cells: list[Cell], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert making.make(cells, workers=1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith(" min); 3 cells left, about 3.0 hours, 1 at a time")  # each record says one hour
    assert lines[-1] == "4 of 4 cells complete, 4 of them by this call"
    assert starts(quick) == ["0", "1", "2", "3"]
    assert making.make(cells, workers=2) == 0
    assert starts(quick) == ["0", "1", "2", "3"]


def test_a_failed_cell_is_named_and_tried_again_by_the_next_call(
    cells: list[Cell], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "broken1").touch()
    assert making.make(cells, workers=2) == 1
    assert f"failed: {cells[1].label}: the loss is not a finite number" in capsys.readouterr().out
    (quick / "broken1").unlink()
    assert making.make(cells, workers=2) == 0
    assert starts(quick) == ["0", "1", "1", "2", "3"]


def test_force_makes_complete_cells_again_once(
    cells: list[Cell], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert making.make(cells[:2], workers=2) == 0
    capsys.readouterr()
    (quick / "broken1").touch()
    assert making.make([with_force(cells[0]), with_force(cells[1]), cells[2]], workers=3) == 1
    said = capsys.readouterr().out
    assert "2 of 3 cells complete, 2 of them by this call" in said, "an earlier record is not what was asked for"
    assert f"failed: {cells[1].label}: the loss is not a finite number" in said
    assert starts(quick) == ["0", "0", "1", "1", "2"]


def test_another_call_may_make_a_cell_with_force(cells: list[Cell]) -> None:
    cell = with_force(cells[0])
    record = {"schema": 1, "status": "complete", "config": cell.config.resolved}
    write_json(cell.config.record_path, record)
    watch = Watch([cell])
    assert not watch.is_made(cell)
    write_json(cell.config.record_path, record)
    assert watch.is_made(cell)
    assert "force=true" in cell_job(cell).command


@pytest.mark.parametrize(
    ("left_by_the_other", "made_here"),
    [({"status": "complete"}, ["1", "2", "3"]), ({"status": "failed", "reason": "diverged"}, ["1", "2", "3"]),
     (None, ["0", "1", "2", "3"])],
)  # fmt: skip
def test_a_cell_in_the_hands_of_another_call_is_waited_for_and_taken_up_if_nothing_came_of_it(
    cells: list[Cell],
    quick: Path,
    left_by_the_other: dict[str, str] | None,
    made_here: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = {"schema": 1, "config": cells[0].config.resolved, **(left_by_the_other or {})}
    program = (
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(2)\n"
        "    import pathlib; p = pathlib.Path(sys.argv[2]); p.parent.mkdir(parents=True, exist_ok=True)\n"
        "    if sys.argv[3]: p.write_text(sys.argv[3])\n"
    )
    lock_of(cells[0]).parent.mkdir(parents=True)
    arguments = [str(lock_of(cells[0])), str(cells[0].config.record_path)]
    arguments += [json.dumps(record) if left_by_the_other else ""]
    other = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    has_failed = left_by_the_other is not None and left_by_the_other["status"] == "failed"
    assert making.make(cells, workers=3, poll=0.1) == int(has_failed)
    assert (f"failed: {cells[0].label}" in (said := capsys.readouterr().out)) is has_failed
    assert ("diverged" in said) is has_failed
    assert starts(quick) == made_here
    assert other.wait() == 0


def test_two_calls_make_each_cell_once(cells: list[Cell], quick: Path) -> None:
    context = multiprocessing.get_context("fork")

    def work() -> None:
        sys.exit(making.make(cells, workers=1, poll=0.05))

    calls = [context.Process(target=work) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)
    assert [call.exitcode for call in calls] == [0, 0]
    assert starts(quick) == ["0", "1", "2", "3"]


def test_the_last_error_of_a_log_is_not_the_advice_after_it(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("Traceback:\n  File x\ntorch.AcceleratorError: CUDA error: illegal access\nCompile with DSA.\n")
    assert last_error(log) == "torch.AcceleratorError: CUDA error: illegal access"
    log.write_text("ValueError: early\nerror: train.lr=0 is not allowed\nbye\n")
    assert last_error(log) == "train.lr=0 is not allowed"


@pytest.mark.parametrize(
    ("status", "log", "said"),
    [
        (-9, "loading\n 50%|#####     | 5/10\r", ["SIGKILL", "memory"]),
        (-6, "error: no space left\n", ["no space left", "SIGABRT"]),
        (1, "one\ntwo\n\n", ["status 1", "two"]),
        (1, "error: train.lr=0\nbye\n", ["train.lr=0"]),
        (3, "", ["status 3"]),
    ],
)
def test_a_process_that_was_killed_is_not_explained_by_a_line_of_its_log(
    status: int, log: str, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.log"
    path.write_text(log)
    found = explain_end(EndedJob(job=Job(label="x", command=(), log=path), status=status, minutes=0.0))
    assert all(one in found for one in said)
    assert "%" not in found
    assert (str(path) in found) is (status < 0 or "error" not in log)


def test_a_stop_ends_the_processes(tmp_path: Path) -> None:
    jobs = [
        Job(label=str(n), command=(sys.executable, "-c", "import time; time.sleep(60)"), log=tmp_path / f"{n}.log")
        for n in range(3)
    ]
    done = Job(label="done", command=(sys.executable, "-c", ""), log=tmp_path / "done.log")
    began = time.monotonic()
    running = run_jobs([done, *jobs], workers=3)
    assert next(running).job == done
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    assert time.monotonic() - began < 30


def test_a_real_cell_names_its_plan(
    places: list[str], results: Path, glue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TINY, *SHORT, *places, "train.precision=fp32"]
    assert evidence.main(["0", "--data", str(glue), *given]) == 0
    assert "1 of 1 cells complete, 1 of them by this call" in capsys.readouterr().out
    (path,) = (results / "runs" / "evidence_gates").glob("*.json")
    record = json.loads(path.read_text())
    plan = ROOT / "conf" / "experiment" / "evidence_gates.yaml"
    assert record["plan"] == {"experiment": "evidence_gates", "sha256": plan_hash(plan)}
    assert "evidence" not in record["config"]
    assert evidence.main(["0", "--data", str(glue), *given]) == 0
    assert "1 of 1 cells complete, 0 of them by this call" in capsys.readouterr().out


def test_dry_lists_what_can_run_and_what_waits(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["all", "--data", "glue", "--dry", "task=stsb", *places]) == 0
    said = capsys.readouterr().out
    assert "0 of 3 cells complete" in said
    assert "0 of 15 studies complete" in said, "eight methods where everything trains, seven where only the MLP does"
    command = f"make search SCALE=mini DATA=glue TASKS=stsb ARGS={places[0]}"
    assert f"evidence_paper: 24 of 24 cells wait for 8 searches: {command} makes them (the first: " in said
    assert "runs that will not count" not in said
    assert "left out: block 6 needs TREES=" in said


def test_without_the_hub_one_cell_of_a_task_fails(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = lose_hub(making, monkeypatch)
    assert evidence.main(["0", "task=stsb,mrpc", *places]) == 1
    assert len(started) == 2, "of three rates each"
    assert capsys.readouterr().out.count(f"not started, for the reason of {started[0]}; ") == 2


def test_methods_tasks_and_seeds_of_runs_choose_searches(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["1", "--data", "glue", "--dry", "method=lora,full", "task=cola", "seed=42", *places]) == 0
    said = capsys.readouterr().out
    assert "0 of 2 studies complete" in said
    assert {line.split()[0] for line in said.splitlines() if line.startswith("evidence-")} == {
        "evidence-minilm-lora-cola",
        "evidence-minilm-full-cola",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["9"], "BLOCK=9 is not allowed: choose one of 0, 1, 2, 2a, 2b"),
        (["6"], "block 6 needs TREES="),
        (["0", "--workers", "0"], "WORKERS=0"),
        (["2a", "task=stsb", "method=full,lora", "seed=42"], "evidence-minilm-full-stsb is missing"),
        (["2a", "--data", "nowhere"], "DATA=nowhere does not exist: give the folder with GLUE"),
        (
            ["2a", "--data", ".", "task=stsb", "method=full", "seed=42"],
            "DATA=. has no stsb: put its files into stsb or STS-B",
        ),
    ],
)
def test_bad_input_of_the_runs_is_one_line(
    arguments: list[str], message: str, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.main([*arguments, *places]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
