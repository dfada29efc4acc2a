"""Kill real runs at random moments, 20 times a method, and compare what they end with.

    python -m experiments.kill_test                     # all methods, SIGKILL, SIGTERM, SIGINT and a full disk in turn
    python -m experiments.kill_test --methods lora --kills 3

A method's run is started and killed until it has been killed `--kills` times, then left to end; its record must be
that of a run never interrupted: scores, losses, and the hash of the chosen weights, bit for bit. After a kill in
four a file of the newest checkpoint is also cut in half. The outcome goes to results/reliability/kill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsegrad.records import read_record, write_json

ROOT = Path(__file__).parents[1]
METHODS = {
    **{name: (f"method={name}",) for name in ("full", "lora", "lora_tuned", "meprop", "sparsegrad")},
    "sparsegrad layer": ("method=sparsegrad", "method.engine=layer"),
    **{name: (f"method={name}",) for name in ("sparsegrad_authors", "sparsegrad_fast")},
}
HOW = ("SIGKILL", "SIGTERM", "SIGINT", "full disk")
ENDED = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "full disk": 2}


def command(method: str, folder: Path, data: Path, steps: int) -> list[str]:
    """`run.py` on a model of two layers; a checkpoint every seven steps."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    architecture = [f"model.architecture.{name}={value}" for name, value in small.items()]
    model = ["model.weights=random", "model.tokenizer=asset:minilm", "model.lora_rank=2", "model.authors_keep=40"]
    train = [
        "train.batch_size=4",
        "train.lr=1e-3",
        "train.device=cpu",
        "protocol.eval_steps=7",
        "protocol.patience=null",
    ]
    places = [f"data.dir={data}", f"results_dir={folder / 'results'}", f"work_dir={folder / 'work'}"]
    chosen = [*METHODS[method], "task=sst2", f"protocol.max_steps={steps}"]
    return [sys.executable, str(ROOT / "run.py"), *chosen, *architecture, *model, *train, *places]


def write_data(folder: Path) -> Path:
    """A folder with 24 and 10 rows of two kinds."""
    (folder / "sst2").mkdir(parents=True)
    for part, count in (("train", 24), ("validation", 10)):
        rows = [{"sentence": f"{('bad', 'good')[i % 2]} film {part} {i}", "label": i % 2} for i in range(count)]
        (folder / "sst2" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(line: list[str], folder: Path, file_limit: int | None = None) -> subprocess.Popen[str]:
    """The command as a process; with `file_limit` no file may grow beyond it, as on a full disk."""

    def limit() -> None:
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=folder, env=environment, text=True, preexec_fn=limit, **pipes)


def result(folder: Path) -> dict[str, Any] | None:
    """What must be equal of the record in `folder`; None before there is one."""
    found = list((folder / "results").rglob("*.json"))
    if not found:
        return None
    record = read_record(found[0])
    return {name: record[name] for name in ("result", "evaluations", "losses", "trainable", "status")}


def sealed(folder: Path) -> set[str]:
    """The checkpoints that count, by name."""
    return {path.parent.name for path in folder.glob("work/*/checkpoints/checkpoint-*/manifest.json")}


def kill_once(line: list[str], folder: Path, how: str, draw: random.Random) -> bool:
    """Start, kill at a random moment of the training, and check how it ended; False if it was done before."""
    before = sealed(folder)
    process = start(line, folder, file_limit=100_000 if how == "full disk" and before else None)
    if how != "full disk" or not before:
        wait = draw.choice([draw.uniform(0, 12), None, None])  # anywhere from the start, or soon after a checkpoint
        wait_until(process, (lambda: bool(sealed(folder) - before)) if wait is None else None, wait or 60)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.Signals[how if how != "full disk" else "SIGKILL"])
    error = process.communicate(timeout=120)[1]
    early = (
        -signal.SIGTERM,
        1,
    )  # before run.py listens: ended by the signal itself, or by Python's Ctrl-C while importing
    if process.returncode not in (0, *ENDED.values(), *early):
        raise RuntimeError(f"{how} ended with {process.returncode}: {error[-2000:]}")
    return process.returncode != 0


def wait_until(process: subprocess.Popen[str], condition: Any, seconds: float) -> None:
    """Until the condition holds, the process ends, or the time is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not (condition and condition()):
        time.sleep(0.01)


def cut(folder: Path, draw: random.Random) -> bool:
    """Cut a random file of the newest checkpoint in half, if there is another checkpoint to go on from."""
    found = sorted(folder.glob("work/*/checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [path for path in found[-1].iterdir() if path.is_file()] if len(found) > 1 else []
    if files:
        chosen = draw.choice(sorted(files))
        chosen.write_bytes(chosen.read_bytes()[: chosen.stat().st_size // 2])
    return bool(files)


def try_method(method: str, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Kill, cut, end; the counts and whether the record is that of an uninterrupted run."""
    draw, done, cuts = random.Random(f"{method}{seed}"), dict.fromkeys(HOW, 0), 0
    with tempfile.TemporaryDirectory() as name:
        data = write_data(Path(name) / "data")
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        for place in (whole, folder):
            place.mkdir()
        finish(command(method, whole, data, steps), whole)
        line = command(method, folder, data, steps)
        while sum(done.values()) < kills and result(folder) is None:
            how = HOW[sum(done.values()) % len(HOW)]
            done[how] += kill_once(line, folder, how, draw)
            cuts += draw.random() < 0.25 and cut(folder, draw)
        finish(line, folder)
        equal = result(folder) == result(whole)
    return {"method": method, "kills": done, "cut_checkpoints": cuts, "steps": steps, "equal": equal}


def finish(line: list[str], folder: Path) -> None:
    """Let a run come to its end."""
    process = start(line, folder)
    error = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"an uninterrupted run ended with {process.returncode}: {error[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 if every record is equal."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kill_test", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/reliability/kill.json")
    chosen = parser.parse_args(arguments)
    rows = []
    for method in chosen.methods:
        rows.append(try_method(method, chosen.kills, chosen.steps, chosen.seed))
        print(rows[-1], flush=True)
        write_json(chosen.out, {"seed": chosen.seed, "methods": rows})
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
