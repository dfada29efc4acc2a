"""Workers, and ordinary runs, that Hydra's launchers start: on this machine, and through Slurm's commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from optuna.trial import TrialState
from run_fixtures import FAKE_SWEEP, ROOT, Composer, RunPy, last_wins

from sparsegrad.errors import UserError
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.packing import take_device
from sparsegrad.sweeps.study import open_study

TRIALS = 6
# Trials long enough that the second worker, which starts a little later, has its share.
BASE = last_wins(*FAKE_SWEEP, f"sweep.trials={TRIALS}", "protocol.patience=1500")
# Slurm's commands as submitit uses them: both tasks of an array start at once, here, and are never seen to end.
SLURM = {
    "sbatch": """cp "$1" "$(dirname "$0")/script"
for task in 0 1; do
  SLURM_JOB_ID=7$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$1" >/dev/null 2>&1 &
done
echo Submitted batch job 7""",
    "srun": 'until [[ ${1##*/} == python* ]]; do shift; done; exec "$@"',
    "sacct": r"printf 'JobID|State|NodeList\n7_0|RUNNING|here\n7_1|RUNNING|here\n'",
}


def needs(launcher: str) -> str:
    """The launcher's name, if it is installed."""
    module, extra = {"joblib": ("joblib", "joblib"), "ray": ("ray", "ray")}.get(launcher, ("submitit", "slurm"))
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.hydra_{module}_launcher") is None:
        pytest.skip(f"hydra/launcher={launcher} is not installed (pip install -e '.[{extra}]')")
    return f"hydra/launcher={launcher}"


def check_two_workers(said: subprocess.CompletedProcess[str], conf: Composer, places: tuple[str, str]) -> None:
    """The study has exactly its trials, both workers had some, and each has its record."""
    assert said.returncode == 0, said.stderr
    trials = open_study(make_plan(conf(*BASE, *places))).study.trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(done) == TRIALS
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    assert len({trial.user_attrs["worker"]["pid"] for trial in done}) == 2
    records = Path(places[0].removeprefix("results_dir=")).glob("runs/fault/*.json")
    assert sorted(map(str, records)) == sorted(trial.user_attrs["record"] for trial in done)


@pytest.mark.parametrize("launcher", ["submitit_local", "joblib", "ray"])
def test_a_launcher_starts_workers_of_one_study(
    launcher: str, run_py: RunPy, conf: Composer, places: tuple[str, str]
) -> None:
    more = needs(launcher), *(("hydra.launcher.n_jobs=2",) if launcher == "joblib" else ())
    more = (*more, "sweep.worker=range(2)")
    python = sys.executable if launcher == "submitit_local" else ""  # it knows its processes by their numbers
    said = run_py("-m", *BASE, *places, *more, python=python, PYTHONPATH=str(ROOT / "tests" / "support"))
    check_two_workers(said, conf, places)


def test_slurm_is_asked_for_an_array_of_workers(
    run_py: RunPy, conf: Composer, places: tuple[str, str], tmp_path: Path
) -> None:
    needs("submitit_slurm")
    tools = tmp_path / "slurm"
    tools.mkdir()
    for name, script in SLURM.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    more = "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "sweep.worker=range(2)"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    said = run_py("-m", *BASE, *places, *more, PYTHONPATH=str(ROOT / "tests" / "support"), PATH=path)
    check_two_workers(said, conf, places)
    asked = (tools / "script").read_text()
    for option in ("array=0-1%2", "time=1440", "gpus-per-node=1", "cpus-per-task=4", "mem=16GB", "partition=gpu"):
        assert f"#SBATCH --{option}\n" in asked


def test_a_launcher_starts_ordinary_runs_and_brings_their_errors(run_py: RunPy, small: tuple[str, ...]) -> None:
    said = run_py("-m", *last_wins(*small), needs("joblib"), "hydra.launcher.n_jobs=2", "seed=1,2,-3")
    results = next(value.removeprefix("results_dir=") for value in small if value.startswith("results_dir="))
    records = [json.loads(path.read_text()) for path in Path(results).glob("runs/adhoc/*.json")]
    assert sorted((record["config"]["seed"], record["status"]) for record in records) == [
        (1, "complete"),
        (2, "complete"),
    ]
    assert said.returncode == 1
    assert "error: seed=-3 is not allowed" in said.stderr
    assert "Traceback" not in said.stderr


def test_workers_of_a_launch_do_not_delete_their_study(conf: Composer) -> None:
    with pytest.raises(UserError, match="would delete each other's study; delete the study first"):
        make_plan(conf(*FAKE_SWEEP, "sweep.worker=0", "sweep.overwrite=true"))
    with pytest.raises(UserError, match=r"sweep.worker=-1 is not allowed: .*; sweep.worker=range\(4\) starts four"):
        make_plan(conf(*FAKE_SWEEP, "sweep.worker=-1"))


def test_launched_workers_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    take_device(3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    take_device(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
