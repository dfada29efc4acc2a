"""Sweeps as users start them: several processes, some of which are killed, on each storage."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState
from quick_python import quick_python
from run_fixtures import FAKE_SWEEP, ROOT, Composer, environment, free_port, last_wins

from sparsegrad.errors import UserError
from sparsegrad.runs.records import read_record
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.ledger import SURPLUS
from sparsegrad.sweeps.pool import run_sweep, start_workers
from sparsegrad.sweeps.storage import open_store
from sparsegrad.sweeps.study import SharedStudy, open_study
from sparsegrad.sweeps.worker import Worker

TRIALS = 20

Fault = Callable[..., DictConfig]


@pytest.fixture
def fault(conf: Composer, places: tuple[str, str]) -> Fault:
    """`fault(*overrides)`: a sweep of 20 trials of 0.3 seconds each."""
    quick_python()  # for the workers
    return lambda *overrides: conf(*last_wins(*FAKE_SWEEP, f"sweep.trials={TRIALS}", *places, *overrides))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install -e '.[sweep]')")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    # The server refuses to run as root.
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
    data, port = folder / "data", free_port()
    (folder / "password").write_text("sesame")
    (folder / "password").chmod(0o644)
    login = ["-A", "scram-sha-256", "-U", "sweeper", f"--pwfile={folder}/password"]
    subprocess.run([binaries / "initdb", "-D", data, "--no-sync", *login], **quiet)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [binaries / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], **quiet)
    yield f"postgresql://sweeper:sesame@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


def _postgres_binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`; Debian does not put it on the PATH."""
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in found if (folder / "pg_ctl").exists()), None)


def test_killed_workers_cost_nothing_with_sqlite(fault: Fault, tmp_path: Path) -> None:
    check_kills(fault(), tmp_path)


def test_killed_workers_cost_nothing_with_postgres(
    fault: Fault, tmp_path: Path, postgres: str, capfd: pytest.CaptureFixture[str]
) -> None:
    composed = fault(f"sweep.storage='{postgres}'")
    check_kills(composed, tmp_path)
    run_sweep(composed)
    said = capfd.readouterr()
    assert "sweeper:***@127.0.0.1" in said.out
    shown = [said.out, said.err, *(path.read_text() for path in tmp_path.rglob("*.json"))]
    assert len(shown) == TRIALS + 2
    assert not any("sesame" in text for text in shown)
    with pytest.raises(UserError, match=r"sweeper:\*\*\*@127.0.0.1:\d+/postgres cannot be used") as error:
        open_store(postgres.replace("sesame", "opensaysme"))
    assert "opensaysme" not in str(error.value)


def check_kills(composed: DictConfig, folder: Path) -> None:
    """Four workers; two are killed at work, two more are started; in the end all is done exactly once."""
    shared = open_study(make_plan(composed))
    workers = start_workers(composed, 4)
    wait_for(lambda: len(shared.ledger().finished(TRIALS)) >= 6, workers)
    killed = kill_two_at_work(shared)
    workers += start_workers(composed, 2)
    for worker in workers:
        worker.join(60)
    assert sorted(worker.exitcode or 0 for worker in workers) == [-signal.SIGKILL] * 2 + [0] * 4
    trials, done = shared.study.trials, shared.ledger().finished(TRIALS)
    assert len(done) == TRIALS
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == TRIALS
    rest = {trial.number for trial in trials if trial.state != TrialState.COMPLETE and SURPLUS not in trial.user_attrs}
    assert rest == {trial.number for trial in killed}
    redone = {trial.user_attrs["redo_of"]: trial.params for trial in done if "redo_of" in trial.user_attrs}
    assert redone == {trial.number: trial.params for trial in killed}
    check_records(folder, done)


def kill_two_at_work(shared: SharedStudy) -> list[FrozenTrial]:
    """Kill the workers of two trials that have just begun; those trials."""
    killed: dict[int, FrozenTrial] = {}
    while len(killed) < 2:
        for trial in shared.study.get_trials(states=(TrialState.RUNNING,)):
            pid = trial.user_attrs.get("worker", {}).get("pid")
            begun = len(trial.intermediate_values) == 1 and "redo_of" not in trial.user_attrs
            if pid is not None and pid not in killed and len(killed) < 2 and begun:
                os.kill(pid, signal.SIGKILL)
                killed[pid] = trial
    return list(killed.values())


def check_records(folder: Path, done: list[FrozenTrial]) -> None:
    """One whole record for each finished trial; nothing else is left."""
    paths = [path for path in (folder / "results" / "runs").rglob("*") if path.is_file()]
    assert sorted(map(str, paths)) == sorted(trial.user_attrs["record"] for trial in done)
    rates = Counter(read_record(path)["config"]["train"]["lr"] for path in paths)
    assert rates == Counter(trial.params["train.lr"] for trial in done)
    assert len(rates) == TRIALS


def wait_for(condition: Callable[[], bool], workers: list[BaseProcess]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert any(worker.is_alive() for worker in workers), "all workers ended"
        assert time.monotonic() < end, "the workers did not start"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_command_alone_ends_its_workers(fault: Fault, places: tuple[str, str], number: int) -> None:
    """A scheduler may signal only the process that it started; workers left behind would go on training."""
    more = environment(PYTHONPATH=str(ROOT / "tests" / "support"))
    settings = ("sweep.trials=1000", "sweep.workers=2")
    shared = open_study(make_plan(fault(*settings)))
    command = subprocess.Popen([quick_python(), "run.py", *FAKE_SWEEP, *places, *settings], cwd=ROOT, env=more)
    workers = set[int]()
    try:
        while len(workers) < 2:
            assert command.poll() is None, "the command ended early"
            trials = shared.study.get_trials(states=(TrialState.RUNNING,))
            workers |= {trial.user_attrs["worker"]["pid"] for trial in trials if "worker" in trial.user_attrs}
            time.sleep(0.1)
        command.send_signal(number)
        assert command.wait(60) == 128 + number
    finally:
        command.kill()
        left = list(filter(_is_running, workers))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_the_command_starts_workers_and_refuses_a_key_set_twice(tmp_path: Path) -> None:
    places = f"results_dir={tmp_path}/results", f"work_dir={tmp_path}/work"
    more = environment(PYTHONPATH=str(ROOT / "tests" / "support"))
    base = [quick_python(), "run.py", *FAKE_SWEEP, *places, "sweep.trials=6", "sweep.workers=2"]
    pipes: dict[str, Any] = {"cwd": ROOT, "env": more, "capture_output": True, "text": True, "timeout": 90}
    fine = subprocess.run(base, check=False, **pipes)
    assert fine.returncode == 0, fine.stderr
    assert "6 of 6 trials finished, 0 of them pruned; best accuracy" in fine.stdout
    # On a busy machine the sweep is long enough for a line at its end.
    assert re.sub(r"trials: 6 trials in .*\n", "", fine.stderr) == ""
    twice = subprocess.run([*base, "train.lr=1e-3,1e-4", "-m"], check=False, **pipes)
    assert twice.returncode != 0
    assert "train.lr is set by Hydra's multirun and searched by the sweep: drop one of the two" in twice.stderr


def test_the_grpc_proxy_serves_too(fault: Fault, tmp_path: Path) -> None:
    port = free_port()
    serve = (
        "import optuna; optuna.storages.run_grpc_proxy_server("
        f"optuna.storages.RDBStorage('sqlite:///{tmp_path}/s.db'), host='127.0.0.1', port={port})"
    )
    proxy = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        composed = fault(f"sweep.storage='grpc://127.0.0.1:{port}'", "sweep.trials=4", "protocol.patience=null")
        run_sweep(composed)
        shared = open_study(make_plan(composed))
        assert [trial.state for trial in shared.study.trials] == [TrialState.COMPLETE] * 4
    finally:
        proxy.terminate()
        proxy.wait()
    with pytest.raises(UserError, match=r"storage grpc://.* is no longer available .*run the same command"):
        Worker(shared).work()
