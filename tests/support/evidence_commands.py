"""What the tests of `make search` and `make evidence` share: their folders, and the stand-in runner of trials."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, TINY, environment

FAKE = (*TINY, "sweep.runner=sweep_fakes.run", "sweep.heartbeat=0.5")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder; processes start at once and find the stand-in runner."""
    monkeypatch.setattr(sys, "executable", quick_python())
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, value in environment(PYTHONPATH=path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "results"


@pytest.fixture
def empty_glue(tmp_path: Path) -> str:
    """A folder with GLUE's folders: the stand-in reads no files, but a folder without the task would be refused."""
    for task in ("mrpc", "stsb", "sst2", "cola"):
        (tmp_path / "glue" / task).mkdir(parents=True)
    return str(tmp_path / "glue")


@pytest.fixture
def places(results: Path, tmp_path: Path) -> list[str]:
    return [f"results_dir={results}", f"work_dir={tmp_path / 'work'}"]
