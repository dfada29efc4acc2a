"""The Slurm scripts, run by bash with stand-ins for Slurm's commands and for Python."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_fixtures import ROOT

SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sh"))
SWEEP = next(script for script in SCRIPTS if script.stem == "sweep")
# Waits for TERM as torchrun does, or ends at once with the status it is given.
PYTHON = """#!/bin/bash
echo $$ > pid
echo "${SPARSEGRAD_STORAGE:-} $*" > started
trap 'echo saved > saved; exit 1' TERM
[ -n "${STATUS:-}" ] && exit "$STATUS"
while :; do sleep 0.05; done
"""
STAND_INS = {
    "python": PYTHON,
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> requeued; fi\n',
    "scancel": '#!/bin/bash\nkill "-${1#--signal=}" "$(cat pid)"\n',
}


def start(script: Path, folder: Path, **more: str) -> subprocess.Popen[bytes]:
    for name, text in STAND_INS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16",
    }  # fmt: skip
    places = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(folder / "bin" / "python")}
    return subprocess.Popen(["bash", str(script), "task=cola", "seed=1"], cwd=folder, env={**slurm, **places, **more})


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.02)
    time.sleep(0.3)  # the script has set its traps too
    return path.read_text().strip()


def test_there_is_one_for_one_node_one_for_several_and_one_for_sweeps() -> None:
    assert [script.name for script in SCRIPTS] == ["one-node.sh", "several-nodes.sh", "sweep.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_bash_and_asks_slurm_for_what_it_relies_on(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@180", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("script", [one for one in SCRIPTS if one != SWEEP], ids=lambda path: path.stem)
def test_it_starts_torchrun_with_the_arguments_and_ends_as_that_does(script: Path, tmp_path: Path) -> None:
    assert start(script, tmp_path, STATUS="3").wait(20) == 3
    command = (tmp_path / "started").read_text().split()
    assert command[:2] == ["-m", "torch.distributed.run"]
    assert command[-3:] == ["run.py", "task=cola", "seed=1"]
    assert "--nproc-per-node=4" in command
    if script.stem == "several-nodes":
        assert {"--nnodes=2", "--rdzv-endpoint=node7:23456", "--rdzv-id=123456"} <= set(command)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("storage", ["", "postgresql://me@host/db"])
def test_a_task_of_the_sweep_is_one_worker_with_a_storage_that_all_reach(storage: str, tmp_path: Path) -> None:
    assert start(SWEEP, tmp_path, STATUS="3", SPARSEGRAD_STORAGE=storage).wait(20) == 3
    expected = storage or "journal:outputs/studies/studies.log"
    assert (tmp_path / "started").read_text().split() == [expected, "run.py", "task=cola", "seed=1"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_before_the_time_is_up_it_saves_and_is_queued_again(script: Path, tmp_path: Path) -> None:
    job = start(script, tmp_path)
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    assert wait_for(tmp_path / "saved") == "saved"
    assert wait_for(tmp_path / "requeued") == "requeue 123456"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_task_of_an_array_is_queued_again_alone(script: Path, tmp_path: Path) -> None:
    job = start(script, tmp_path, SLURM_ARRAY_JOB_ID="123456", SLURM_ARRAY_TASK_ID="7")
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    assert wait_for(tmp_path / "requeued") == "requeue 123456_7"


def test_pre_empted_it_saves_and_leaves_the_queue_to_slurm(tmp_path: Path) -> None:
    job = start(SCRIPTS[0], tmp_path)
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 1
    assert wait_for(tmp_path / "saved") == "saved"
    assert not (tmp_path / "requeued").exists()
