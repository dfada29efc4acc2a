"""Measure how the storage of a sweep copes with 10, 100 and 1,000 workers, simulated with short trials on one machine.

    python -m experiments.studies.storage_load                                       # all rows of the docs, 6 minutes
    python -m experiments.studies.storage_load --storage grpc --workers 1000 --trials 1000 --seconds 60

Every simulated worker is a thread with its own `Worker`, `SharedStudy`, heartbeat and connection, so that it reads and
writes exactly what a real worker does. Only its run is replaced: it sleeps for `--seconds` (0.5 to 1.5 times that,
depending on the trial's number), and reports `--evaluations` scores. Heartbeats keep their real interval. Each worker
reports a different machine name, so that others judge by its heartbeats whether it is alive, as on a cluster. The
database and the proxy also run on this machine: `server_cpu_ms_per_trial` is only their processor time, whereas a
latency includes waiting for a processor. `busy` is the share of worker time spent in trials. A measurement ends after
`--limit` seconds, even if trials are left. `reads` is the processor time of one read of a study in which 30 to 1,000
trials are running. It grows with the number of workers, because every worker reads all running trials several times per
trial. Everything is written to results/studies/storage_load.json; a row with the same load is replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from optuna.trial import TrialState, create_trial

from experiments.paths import ROOT
from experiments.studies.storage_servers import STORAGES, postgresql, proxy, read_cpu, read_version, serving
from experiments.studies.storage_workers import START_SECONDS, Load, make_load_plan, run_clients
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.environment import describe_environment
from sparsegrad.sweeps.leases import BEAT, WORKER
from sparsegrad.sweeps.ledger import SURPLUS
from sparsegrad.sweeps.reporter import PROGRESS
from sparsegrad.sweeps.study import SharedStudy, open_study

# Storage, workers, trials, seconds per trial, limit, connections that PostgreSQL allows.
SUITE = (
    ("sqlite", 10, 30, 5, 30, 100),
    ("journal", 30, 60, 5, 30, 100),
    ("postgresql", 100, 100, 5, 15, 100),  # more connections than PostgreSQL allows by default
    ("postgresql", 100, 100, 20, 45, 300),
    ("grpc", 100, 100, 20, 45, 100),
    ("grpc", 1000, 1000, 20, 75, 100),
)
RUNNING = (30, 100, 300, 1000)  # trials, for `reads`
LOOKS = 10  # of which the cost is a mean


def measure(load: Load) -> dict[str, Any]:
    """Run one simulation; returns its row."""
    with (
        tempfile.TemporaryDirectory(prefix="load") as folder,
        serving(load.storage, Path(folder), load.max_connections) as (where, servers),
    ):
        shared = open_study(make_load_plan(load, where))  # creates the tables
        context: Any = multiprocessing.get_context("forkserver")  # gRPC and its threads must not be forked
        context.set_forkserver_preload([run_clients.__module__])  # imports, once
        barrier, results = context.Barrier(load.processes + 1), context.Queue()
        shares = [len(range(one, load.workers, load.processes)) for one in range(load.processes)]
        clients = [
            context.Process(
                target=run_clients, args=(load, where, sum(shares[:one]), shares[one], barrier, results), daemon=True
            )
            for one in range(load.processes)
        ]
        for client in clients:
            client.start()
        barrier.wait(START_SECONDS + 60)
        start, cpu = time.time(), read_cpu(servers)
        found = [results.get(timeout=load.limit + 120) for _ in clients]
        row = _make_row(load, shared, found, start, read_cpu(servers) - cpu)
        for client in clients:
            client.join(10)
        return row


def _make_row(load: Load, shared: SharedStudy, found: list[Any], start: float, server_cpu: float) -> dict[str, Any]:
    ledger, seconds, errors = shared.ledger(), defaultdict[str, list[float]](list), Counter[str]()
    for durations, faults, _ in found:
        errors.update(faults)
        for name, values in durations.items():
            seconds[name] += values
    done = ledger.finished(load.trials)
    ends = [trial.datetime_complete.timestamp() for trial in done if trial.datetime_complete is not None]
    wall, count = max(ends, default=start + load.limit) - start, max(1, len(done))
    slept = sum(seconds.pop("slept", []))
    return {
        **asdict(load),
        "started": len(ledger.fresh),
        "finished": len(done),
        "finished_twice": sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in ledger.trials)
        - len(done),
        "given_to_another_worker": sum("redo_of" in trial.user_attrs for trial in ledger.trials),
        "surplus": sum(SURPLUS in trial.user_attrs for trial in ledger.trials),
        "wall_seconds": round(wall, 1),
        "trials_per_second": round(len(done) / wall, 2),
        "busy": round(slept / (load.workers * wall), 3),
        "server_cpu_ms_per_trial": round(1000 * server_cpu / count, 1),
        "client_cpu_ms_per_trial": round(1000 * sum(cpu for *_, cpu in found) / count, 1),
        "reads_per_trial": round(len(seconds["read"]) / count, 1),
        "operations": {name: _summarize(values) for name, values in sorted(seconds.items())},
        "errors": dict(errors),
    }


def _summarize(seconds: list[float]) -> dict[str, float]:
    median, late = np.percentile(seconds, [50, 99])
    return {
        "count": len(seconds),
        "median_ms": round(1000 * median, 1),
        "p99_ms": round(1000 * late, 1),
        "max_ms": round(1000 * max(seconds), 1),
    }


def measure_reads() -> list[dict[str, Any]]:
    """Measure the processor time of reading a study once, at the database, at the proxy and at the worker."""
    rows, load = [], _make_load("postgresql", 1, 10**6, 60, 60, 100)
    with postgresql(100) as (where, database), proxy(where) as (address, server):
        direct, proxied = (open_study(make_load_plan(load, one)) for one in (where, address))
        for running in RUNNING:
            _start_trials(direct, running)
            for name, shared in (("postgresql", direct), ("grpc", proxied)):
                rows.append({"storage": name, "running": running, **_measure_read(shared, database, server)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _start_trials(shared: SharedStudy, running: int) -> None:
    """Let so many trials run; each has what a real one has written halfway."""
    attributes = {WORKER: {"machine": "simulated", "pid": 1, "started": 0.0}, BEAT: 20, PROGRESS: [5, 10]}
    one = create_trial(
        state=TrialState.RUNNING, params={"train.batch_size": 16, "train.lr": 1e-3},
        distributions=shared.plan.distributions, user_attrs=attributes,
        intermediate_values=dict.fromkeys(range(1, 6), 0.5),
    )  # fmt: skip
    for _ in range(running - len(shared.ledger().trials)):
        shared.study.add_trial(one)


def _measure_read(shared: SharedStudy, database: psutil.Process, server: psutil.Process) -> dict[str, float]:
    shared.ledger()  # the first call reads what later ones remember
    start = time.process_time(), read_cpu([database]), read_cpu([server])
    for _ in range(LOOKS):
        shared.ledger()
    used = np.subtract((time.process_time(), read_cpu([database]), read_cpu([server])), start) * 1000 / LOOKS
    return {
        f"{name}_cpu_ms": round(float(one), 1) for name, one in zip(("worker", "database", "proxy"), used, strict=True)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one row for each number of workers, or all rows of the docs."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.storage_load", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--storage", choices=STORAGES, help="default: all rows of the docs")
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--trials", type=int, help="default: twice the workers")
    parser.add_argument("--seconds", type=float, default=20, help="mean length of a trial; default: %(default)s")
    parser.add_argument("--limit", type=float, default=170, help="seconds of a measurement; default: %(default)s")
    parser.add_argument("--max-connections", type=int, default=100, help="of PostgreSQL; default: its own, %(default)s")
    parser.add_argument("--pruner", default="none", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "results/studies/storage_load.json")
    chosen = parser.parse_args(arguments)
    rest = (chosen.seconds, chosen.limit, chosen.max_connections)
    some = [(chosen.storage, count, chosen.trials or 2 * count, *rest) for count in chosen.workers]
    if chosen.storage is None:
        _write(chosen.out, {"reads": measure_reads()})
    for one in some if chosen.storage else SUITE:
        row = measure(replace(_make_load(*one), pruner=chosen.pruner))
        print(json.dumps(row), flush=True)
        _write_row(chosen.out, row)
    print(make_tables(read_json(chosen.out)))
    return 0


def make_tables(document: dict[str, Any]) -> str:
    """The tables of docs/sweeps.md, in Markdown: what the workers saw, and what reading a study costs."""
    names = (
        "storage", "workers", "started", "finished", "trials/s", "busy", "read, median / 99 %", "heartbeat, 99 %",
        "server CPU per trial", "errors",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in document.get("rows", []):
        read, beat = (row["operations"].get(name, {}) for name in ("read", "heartbeat"))
        cells = [
            row["storage"], row["workers"], row["started"], f"{row['finished']} of {row['trials']}",
            row["trials_per_second"],
            f"{row['busy']:.0%}", f"{read.get('median_ms', '-')} / {read.get('p99_ms', '-')} ms",
            f"{beat.get('p99_ms', '-')} ms", f"{row['server_cpu_ms_per_trial']} ms",
            "; ".join(f"{count} x {what}" for what, count in row["errors"].items()) or "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| trials running | storage | worker CPU | proxy CPU | database CPU |", "|---|---|---|---|---|"]
    for one in document.get("reads", []):
        costs = " | ".join(f"{one[f'{part}_cpu_ms']} ms" for part in ("worker", "proxy", "database"))
        lines.append(f"| {one['running']} | {one['storage']} | {costs} |")
    return "\n".join(lines)


def _make_load(storage: str, workers: int, trials: int, seconds: float, limit: float, max_connections: int) -> Load:
    return Load(
        storage=storage, workers=workers, trials=trials, seconds=seconds, limit=limit, max_connections=max_connections,
        pruner="none", evaluations=10, heartbeat=15, sampler="tpe", processes=2,
    )  # fmt: skip


def _write_row(out: Path, row: dict[str, Any]) -> None:
    """Add a row to the file; it replaces one of the same load."""
    rows = read_json(out).get("rows", []) if out.is_file() else []
    keys = ("storage", "workers", "trials", "seconds", "limit", "pruner", "max_connections")
    _write(out, {"rows": [one for one in rows if any(one[key] != row[key] for key in keys)] + [row]})


def _write(out: Path, part: dict[str, Any]) -> None:
    """Replace a part of the file; all of it was measured where the last part was."""
    environment = describe_environment(torch.device("cpu"))
    environment["versions"] |= {name: version(name) for name in ("optuna", "sqlalchemy", "psycopg", "grpcio")}
    environment["versions"]["postgresql"] = read_version()
    document = read_json(out) if out.is_file() else {}
    what = " ".join(__doc__.split("\n\n")[2].split())
    write_json(out, {**document, **part, "what": what, "environment": environment})


if __name__ == "__main__":
    sys.exit(main())
