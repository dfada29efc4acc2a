"""Kill real runs at random moments, and compare their records with those of uninterrupted runs.

    python -m experiments.reliability.kill      # all methods; SIGKILL, SIGTERM, SIGINT and a full disk in turn
    python -m experiments.reliability.kill --methods lora --kills 3

A method's run is started and killed `--kills` times (20 by default), then left to finish. Its record must equal that
of an uninterrupted run bit for bit: scores, losses, and the hash of the chosen weights. After one kill in four, a file
of the newest checkpoint is also truncated to half its size. Results are written to results/reliability/kills.json, one
row per method; rows of methods that are not run this time stay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess as Run
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - imported here once; each run is a fork that has it already
import torch

import sparsegrad.runs.runner  # noqa: F401
from experiments.paths import ROOT
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment
from sparsegrad.runs.records import read_record

ERRORS = "stderr.txt"
METHODS = {
    **{name: (f"method={name}",) for name in ("full", "lora", "lora_tuned", "meprop", "sparsegrad")},
    "sparsegrad layer": ("method=sparsegrad", "method.engine=layer"),
    **{name: (f"method={name}",) for name in ("sparsegrad_authors", "sparsegrad_fast")},
}
INTERVAL = 7  # steps between two checkpoints
SPARE = 5  # runs that may finish unkilled, beyond the number of kills, before a method's row counts as failed
HOW = ("SIGKILL", "SIGTERM", "SIGINT", "full disk")
# Allowed exit statuses. Before run.py handles signals, the signal itself or a KeyboardInterrupt ends the process.
ENDED = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130, -2, 1), "full disk": (2,)}


def command(method: str, folder: Path, data: Path, steps: int) -> list[str]:
    """Overrides for `run.py`: a model of two layers, with a checkpoint every `INTERVAL` steps."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    architecture = [f"model.architecture.{name}={value}" for name, value in small.items()]
    model = ["model.weights=random", "model.tokenizer=asset:minilm", "model.lora_rank=2", "model.authors_keep=40"]
    train = [
        "train.batch_size=4",
        "train.lr=1e-3",
        "train.device=cpu",
        f"protocol.eval_steps={INTERVAL}",
        "protocol.patience=null",
    ]
    places = [f"data.dir={data}", f"results_dir={folder / 'results'}", f"work_dir={folder / 'work'}"]
    chosen = [*METHODS[method], "task=sst2", f"protocol.max_steps={steps}"]
    return [*chosen, *architecture, *model, *train, *places]


def write_data(folder: Path) -> Path:
    """Write an SST-2 of 24 training and 10 validation rows below `folder`; returns `folder`."""
    (folder / "sst2").mkdir(parents=True)
    for part, count in (("train", 24), ("validation", 10)):
        rows = [{"sentence": f"{('bad', 'good')[i % 2]} film {part} {i}", "label": i % 2} for i in range(count)]
        (folder / "sst2" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(line: list[str], folder: Path, full_disk: bool = False) -> Run:
    """Start `run.py` in a fork of this process, which has already imported the slow packages.

    A full disk is simulated by a limit on file size that every checkpoint exceeds.
    """
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(line, folder, full_disk))
    process.start()
    return process


def _run(line: list[str], folder: Path, full_disk: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    if full_disk:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writes fail with an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    os.chdir(folder)
    for descriptor, name in ((1, os.devnull), (2, folder / ERRORS)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [str(ROOT / "run.py"), *line]
    runpy.run_path(sys.argv[0], run_name="__main__")


def end(process: Run, folder: Path) -> tuple[int | None, str]:
    """Wait until the process ends: (exit status, or minus the number of the signal that ended it; its stderr)."""
    process.join(600)
    status, error = process.exitcode, folder / ERRORS
    return status, error.read_text(errors="replace") if error.exists() else ""


def result(folder: Path) -> dict[str, Any] | None:
    """The fields of the record in `folder` that must be equal; None if there is no record yet."""
    found = list((folder / "results").rglob("*.json"))
    if not found:
        return None
    record = read_record(found[0])
    return {name: record[name] for name in ("result", "evaluations", "losses", "trainable", "status")}


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none yet."""
    found = folder.glob("work/*/checkpoints/checkpoint-*/manifest.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


def kill_once(line: list[str], folder: Path, how: str, draw: random.Random) -> dict[str, Any] | None:
    """Start a run, kill it at a random moment, and check how it ended; None if it finished before the kill.

    One kill in three comes at a random time in the first 4 seconds, for example during imports or calibration. The
    others come shortly after one of the next checkpoints.
    """
    before = newest(folder)
    if how == "full disk" and not before:
        how = "SIGKILL"  # without a checkpoint, a run on a full disk could not even start
    process, more = start(line, folder, full_disk=how == "full disk"), draw.randint(1, 4) * INTERVAL
    if how != "full disk":
        wait_until(process, lambda: newest(folder) >= before + more, draw.choice([draw.uniform(0, 4), 120, 120]))
        time.sleep(draw.uniform(0, 0.3))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.Signals[how])
    status, error = end(process, folder)
    if status not in (0, *ENDED[how]) or (status == 1 and "KeyboardInterrupt" not in error):
        raise RuntimeError(f"{how} ended with {status}: {error[-2000:]}")
    return {"how": how, "status": status, "newest": newest(folder)} if status else None


def wait_until(process: Run, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until the condition holds, the process ends, or `seconds` have passed."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end and not condition():
        time.sleep(0.01)


def cut(folder: Path, draw: random.Random) -> bool:
    """Truncate a random file of the newest checkpoint to half, if there is an older checkpoint to resume from."""
    found = sorted(folder.glob("work/*/checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [path for path in found[-1].iterdir() if path.is_file()] if len(found) > 1 else []
    if files:
        chosen = draw.choice(sorted(files))
        chosen.write_bytes(chosen.read_bytes()[: chosen.stat().st_size // 2])
    return bool(files)


def try_method(method: str, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Test one method: its row, with each kill, counts, and whether all records equal the uninterrupted run's.

    A run that finishes before it has been killed often enough is compared too, and a new one starts: on a busy machine
    this process can be too late for a short run, so up to `SPARE` such runs more than kills are made up for.
    """
    draw, cuts = random.Random(f"{method}{seed}"), 0
    log: list[dict[str, Any]] = []
    records: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        data, whole, folder = write_data(Path(name) / "data"), Path(name) / "whole", Path(name) / "killed"
        finish(command(method, whole, data, steps), whole)
        line, expected = command(method, folder, data, steps), result(whole)
        while len(log) < kills and len(records) < kills + SPARE:
            how = HOW[(list(METHODS).index(method) + len(log)) % len(HOW)]
            if killed := kill_once(line, folder, how, draw):
                log.append(killed)
            if result(folder) is not None:
                records.append(result(folder) == expected)
                shutil.rmtree(folder)
            else:
                cuts += draw.random() < 0.25 and cut(folder, draw)
        finish(line, folder)
        records.append(result(folder) == expected)
    counts = {how: sum(kill["how"] == how for kill in log) for how in HOW}
    equal = all(records) and len(log) == kills
    done = {"kills": len(log), **counts, "records_compared": len(records), "cut_checkpoints": cuts, "steps": steps}
    return {"method": method, "equal": equal, **done, "weights": (expected or {})["result"]["weights"], "log": log}


def finish(line: list[str], folder: Path) -> None:
    """Let a run finish."""
    status, error = end(start(line, folder), folder)
    if status:
        raise RuntimeError(f"an uninterrupted run ended with {status}: {error[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all records are equal, else 1."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reliability.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/reliability/kills.json")
    chosen = parser.parse_args(arguments)
    rows = {row["method"]: row for row in json.loads(chosen.out.read_text())["methods"]} if chosen.out.exists() else {}
    for method in chosen.methods:
        row = {**try_method(method, chosen.kills, chosen.steps, chosen.seed), "seed": chosen.seed}
        rows[method] = row
        print({name: value for name, value in row.items() if name != "log"}, flush=True)
        facts = {"environment": describe_environment(torch.device("cpu")), "interval": INTERVAL}
        write_json(chosen.out, {**facts, "methods": [rows[name] for name in METHODS if name in rows]})
    return 0 if all(rows[method]["equal"] for method in chosen.methods) else 1


if __name__ == "__main__":
    sys.exit(main())
