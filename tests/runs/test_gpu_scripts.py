"""The scripts for a GPU, run by bash in a copy of the checkout's layout with a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from run_fixtures import ROOT

# Answers the script's calls: versions, the check of an asset, and a block that leaves a record. Block 2a always fails,
# but its second call, like the first, makes a run.
PYTHON = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo "3.11 torch" ;;
  "-m sparsegrad.assets"*) echo "checked $3" >>checked ;;
  *evidence*) mkdir -p results/runs/new; cd results/runs/new; [ -e 2a.json ] && touch 2a_second.json
    echo "$*" >"$3.json"; [ "$3" != 2a ] ;;
esac
"""

# A block whose first two calls have a fault under MPS and would wait for ever; the third, without MPS, ends.
FAULTY = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo "3.11 torch" ;;
  *evidence*) mkdir -p outputs/work/logs results/runs/new
    echo "MPS: ${CUDA_MPS_PIPE_DIRECTORY:+on}" >>calls
    [ -n "$CUDA_MPS_PIPE_DIRECTORY" ] || { touch results/runs/new/run.json; exit 0; }
    echo "torch.AcceleratorError: CUDA error: an illegal instruction" >"outputs/work/logs/$$.log"
    sleep 300 ;;
esac
"""
WAITING = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo "3.11 torch" ;;
  *evidence*) echo $$ >process; exec sleep 300 ;;
esac
"""
CONTROL = """#!/bin/bash
if [ "$1" = -d ]; then echo started; else cat; fi >>servers
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("gpu_evidence.sh", "gpu_all.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name in ("glue", "results/studies", "results/runs/old", "parts/minilm"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results" / "runs" / "old" / "record.json").write_text("{}")
    os.utime(tmp_path / "results" / "runs" / "old" / "record.json", (1, 1))
    for number in range(12):
        (tmp_path / "parts" / "minilm" / f"part{number:02}").write_text(f"{number},")
    write_program(tmp_path / "python", PYTHON)
    return tmp_path


def call(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/gpu_evidence.sh", "out", "glue", *arguments]
    env = {**os.environ, "PYTHON": str(checkout / "python"), **environment}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def test_a_failed_block_ends_it_and_the_archive_has_what_is_new(checkout: Path) -> None:
    done = call(checkout, BLOCKS="0 1 2a 3", WORKERS="5")
    assert done.returncode == 1, done.stderr
    (path,) = (checkout / "out").glob("records-*.tar.gz")
    with tarfile.open(path) as archive:
        assert sorted(archive.getnames()) == [f"results/runs/new/{run}.json" for run in ("0", "1", "2a", "2a_second")]
    asked = (checkout / "results" / "runs" / "new" / "1.json").read_text()
    assert "--workers 5" in asked
    assert f"--data {checkout / 'glue'}" in asked
    assert "--dry" not in asked
    summary = (checkout / "out" / "summary.txt").read_text().splitlines()
    # Cells may have died with another process of the GPU: a failed block is called again while that makes runs.
    new = [("0", 1), ("1", 1), ("2a", 1), ("2a", 1), ("2a", 0), ("2a", 0)]
    assert summary == [f"block {block}: exit status {int(block == '2a')}, {runs} new records" for block, runs in new]


def test_tasks_and_methods_narrow_the_searches_and_the_blocks(checkout: Path) -> None:
    assert call(checkout, BLOCKS="1 3", TASKS="stsb,cola", METHODS="lora").returncode == 0
    for block in ("1", "3"):
        asked = (checkout / "results" / "runs" / "new" / f"{block}.json").read_text()
        assert f"evidence {block} task=stsb,cola method=lora --data" in asked


def test_a_fault_under_mps_stops_all_and_a_second_one_turns_mps_off(checkout: Path) -> None:
    write_program(checkout / "python", FAULTY)
    write_program(checkout / "nvidia-cuda-mps-control", CONTROL)
    done = call(checkout, BLOCKS="2a", MPS="1", PATH=f"{checkout}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert (checkout / "calls").read_text().splitlines() == ["MPS: on", "MPS: on", "MPS: "]
    assert (checkout / "servers").read_text().splitlines() == 2 * ["started", "quit -t 2"]
    summary = (checkout / "out" / "summary.txt").read_text()
    assert summary.count("everything was stopped") == 2
    assert "block 2a: exit status 0, 1 new records" in summary


def test_a_signal_ends_the_block_too(checkout: Path) -> None:
    write_program(checkout / "python", WAITING)
    command, env = ["bash", "scripts/gpu_evidence.sh", "out", "glue"], {**os.environ, "PYTHON": "./python"}
    script = subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (checkout / "process").exists() or not (checkout / "process").read_text():
        time.sleep(0.05)
    script.terminate()
    assert script.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((checkout / "process").read_text()), 0)


def test_the_parts_of_a_model_are_joined_in_order_and_checked(checkout: Path) -> None:
    assert call(checkout, "--dry", BLOCKS="0", PARTS=str(checkout / "parts")).returncode == 0
    joined = (checkout / "assets" / "minilm" / "model.safetensors").read_text()
    assert joined == "".join(f"{number}," for number in range(12))
    assert (checkout / "checked").read_text() == "checked minilm\n"
    assert "--dry" in (checkout / "results" / "runs" / "new" / "0.json").read_text()


def test_all_checks_are_rehearsed_and_a_failed_one_stops_no_other(checkout: Path) -> None:
    write_program(checkout / "python", '#!/bin/bash\n[[ "$*" != *"-m pytest"* ]]\n')
    command, env = ["bash", "scripts/gpu_all.sh", "out", "--dry"], {**os.environ, "PYTHON": str(checkout / "python")}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    with tarfile.open(checkout / "out" / "gpu_all.tar.gz") as archive:
        summary = archive.extractfile("./summary.txt")
        assert summary is not None
        lines = summary.read().decode().splitlines()
    assert lines == [f"{step}: exit status {int(step == 'tests')}" for step in ("versions", "tests", "bench", "packed")]
