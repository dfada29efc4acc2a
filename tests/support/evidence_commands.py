"""What the tests of `make search` and `make evidence` share: their folders, and the stand-in runner of trials."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, TINY, environment

from experiments.reproduce.processes import EndedJob, Job

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


def lose_hub(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every job that `module` starts fail because it cannot reach the hub; the list gets the labels of those."""
    started: list[str] = []

    def fail(jobs: Iterable[Job], _: int, is_needed: Callable[[Job], bool], *__: Any, **___: Any) -> Iterator[EndedJob]:
        for job in filter(is_needed, jobs):
            started.append(job.label)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("error: data set nyu-mll/glue is not in the cache, and the hub cannot be reached (x)\n")
            yield EndedJob(job=job, status=2, minutes=0.2)

    monkeypatch.setattr(module, "run_jobs", fail)
    return started


@pytest.fixture
def places(results: Path, tmp_path: Path) -> list[str]:
    return [f"results_dir={results}", f"work_dir={tmp_path / 'work'}"]
