"""scripts/gpu_evidence.sh, run by bash in a copy of the checkout's layout with a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from run_fixtures import ROOT

# Answers the script's calls: versions, the check of an asset, and a block that leaves a record. Block 2a always fails,
# but its second call, like the first, makes a run.
PYTHON = """#!/bin/bash
case "$*" in
  -) cat >/dev/null; echo "3.11 torch" ;;
  "-m sparsegrad.assets"*) echo "checked $3" >>checked ;;
  *search_all*) mkdir -p results/runs/new; echo "$*" >results/runs/new/search.json ;;
  *evidence*) mkdir -p results/runs/new; cd results/runs/new; [ -e 2a.json ] && touch 2a_second.json
    echo "$*" >"$3.json"; [ "$3" != 2a ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu_evidence.sh", tmp_path / "scripts")
    for name in ("glue", "results/studies", "results/runs/old", "parts/minilm"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results" / "runs" / "old" / "record.json").write_text("{}")
    os.utime(tmp_path / "results" / "runs" / "old" / "record.json", (1, 1))
    for number in range(12):
        (tmp_path / "parts" / "minilm" / f"part{number:02}").write_text(f"{number},")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def call(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/gpu_evidence.sh", "out", "glue", *arguments]
    env = {**os.environ, "PYTHON": str(checkout / "python"), **environment}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def test_a_failed_block_ends_it_and_the_archive_has_what_is_new(checkout: Path) -> None:
    done = call(checkout, BLOCKS="0 1 2a 3", WORKERS="5")
    assert done.returncode == 1, done.stderr
    with tarfile.open(checkout / "out" / "records.tar.gz") as archive:
        assert sorted(archive.getnames()) == [f"results/runs/new/{run}.json" for run in ("0", "1", "2a", "2a_second")]
    asked = (checkout / "results" / "runs" / "new" / "1.json").read_text()
    assert "--workers 5" in asked
    assert f"--data {checkout / 'glue'}" in asked
    assert "--dry" not in asked
    summary = (checkout / "out" / "summary.txt").read_text().splitlines()
    # Cells may have died with another process of the GPU: a failed block is called again while that makes runs.
    new = [("0", 1), ("1", 1), ("2a", 1), ("2a", 1), ("2a", 0), ("2a", 0)]
    assert summary == [f"block {block}: exit status {int(block == '2a')}, {runs} new records" for block, runs in new]


def test_tasks_narrow_the_searches_and_the_blocks(checkout: Path) -> None:
    assert call(checkout, BLOCKS="1 3", TASKS="stsb,cola").returncode == 0
    asked = checkout / "results" / "runs" / "new"
    assert "search_all --scale mini --tasks stsb,cola --data" in (asked / "search.json").read_text()
    assert "evidence 3 task=stsb,cola --data" in (asked / "3.json").read_text()


def test_the_parts_of_a_model_are_joined_in_order_and_checked(checkout: Path) -> None:
    assert call(checkout, "--dry", BLOCKS="0", PARTS=str(checkout / "parts")).returncode == 0
    joined = (checkout / "assets" / "minilm" / "model.safetensors").read_text()
    assert joined == "".join(f"{number}," for number in range(12))
    assert (checkout / "checked").read_text() == "checked minilm\n"
    assert "--dry" in (checkout / "results" / "runs" / "new" / "0.json").read_text()
