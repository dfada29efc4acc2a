"""`torchrun` and `accelerate launch run.py`, as a user types it: end-to-end runs, a killed process, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from quick_python import quick_python
from run_fixtures import ROOT, environment, free_port
from test_distributed_runs import assert_same, outcome
from test_distributed_runs import bert as bert  # the fixture

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node=2 --master-port={port}",
    # `--multi_gpu` starts processes as torchrun does; `train.device=cpu` then needs no GPU.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no "
    "--dynamo_backend=no --main_process_port={port}",
    "accelerate fsdp2": "accelerate.commands.launch --use_fsdp --fsdp_version=2 --num_processes=2 --num_machines=1 "
    "--mixed_precision=no --dynamo_backend=no --main_process_port={port}",
}
Case = tuple[str, ...]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """`torchrun(*overrides)`: starts run.py in two processes; what is left of them is killed after the test.

    `by` names another of the `LAUNCHERS`, and `python` another Python than the quick one.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str, by: str = "torchrun", python: str = "") -> subprocess.Popen[str]:
        launcher = LAUNCHERS[by].format(port=free_port()).split()
        command = [python or quick_python(), "-m", *launcher, str(ROOT / "run.py"), *overrides]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), text=True, **pipes)
        )
        return started[-1]

    yield start
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()  # and what a quick Python has started
        process.communicate()


def after_a_checkpoint(launcher: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """Waits for the first checkpoint; the two processes."""
    end = time.monotonic() + 200
    while not any(folder.glob("work/*/checkpoints/checkpoint-*/manifest.json")):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.05)
    return launched(launcher)


def launched(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of run.py that this launcher has started: they have the last of its words."""
    found = [process for process in psutil.process_iter(["cmdline"]) if process.pid != launcher.pid]
    words = list(launcher.args)[-3:]  # type: ignore[arg-type]
    return [process for process in found if (process.info["cmdline"] or [])[-3:] == words]


@pytest.mark.parametrize("by", LAUNCHERS)
def test_a_launcher_leaves_the_record_of_one_process_with_the_same_global_batch(
    bert: Case, torchrun: Start, tmp_path: Path, by: str
) -> None:
    case = (*bert, "method=sparsegrad_fast" if "fsdp2" in by else "method=sparsegrad")
    wanted = outcome((*case, "train.batch_size=8"))
    shards = ["train.parallel=fsdp2"] if "fsdp2" in by else []
    python = sys.executable if by == "torchrun" else ""  # one of them as a user types it
    launcher = torchrun(*case, "method.steps=6", "save_model=true", *shards, by=by, python=python)
    printed = launcher.communicate(timeout=200)[0]
    assert launcher.returncode == 0, printed
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/runs/*/*.json")]
    assert sorted(record["config"].get("processes", 1) for record in records) == [1, 2]
    found = outcome_of_two(case, tmp_path)
    assert_same(found, wanted, 1e-5, by)
    assert printed.count("accuracy 0.") == 1, "one process prints"


def outcome_of_two(case: Case, folder: Path) -> dict[str, Any]:
    """What the record and the model of two processes in `folder` say."""
    from safetensors.numpy import load_file

    paths = {path: json.loads(path.read_text()) for path in folder.glob("results/runs/*/*.json")}
    ((path, record),) = [(path, record) for path, record in paths.items() if "processes" in record["config"]]
    return {
        "losses": [row["loss"] for row in record["losses"]],
        "evaluations": [[row["loss"], row["accuracy"]] for row in record["evaluations"]],
        "weights": load_file(folder / "results" / "models" / path.parent.name / path.stem / "model.safetensors"),
    }


def test_a_killed_process_ends_the_job_with_one_error_and_signals_save_first(
    bert: Case, torchrun: Start, tmp_path: Path
) -> None:
    case = (*bert, "method=full", "protocol.max_steps=100000", "protocol.eval_steps=20", "protocol.patience=null")
    launcher = torchrun(*case)
    after_a_checkpoint(launcher, tmp_path)[1].send_signal(signal.SIGKILL)
    printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 1
    ours = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, printed
    assert "lost the connection to another" in ours[0]
    assert "run.py FAILED" in printed
    assert "SIGKILL" in printed
    steps_before = newest(tmp_path)

    again = torchrun(*case)
    end = time.monotonic() + 200
    while newest(tmp_path) <= steps_before:
        assert again.poll() is None, again.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    for process in (*launched(again), again):  # as Slurm signals a whole step: launcher and processes
        process.send_signal(signal.SIGTERM)
    printed = again.communicate(timeout=60)[0]
    assert "stopped by SIGTERM: the same command continues after step " in printed
    assert printed.count("stopped by SIGTERM") == 1


def newest(folder: Path) -> int:
    """Step of the newest whole checkpoint."""
    found = folder.glob("work/*/checkpoints/checkpoint-*/manifest.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)
