"""Measure what several trials on one device gain over one at a time: total time, and how busy the device is.

    python -m experiments.studies.packed_trials --workers 1 2 4

Each number of workers N runs the same new sweep: MiniLM on movie-review snippets, a grid of learning rates and batch
sizes. Each worker has 1/N of the CPU cores, but at least one thread, or 1/N of the GPU (`sweep.workers=N
sweep.device_share=1/N`). `busy` is the share of the time of all cores that was used, according to the operating system;
on a GPU, it is the mean utilisation that the driver reports once per second. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from experiments.paths import ROOT
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment
from sparsegrad.sweeps.study import load_study

_RATES, _ROWS = "[3.0e-5,1.0e-4,3.0e-4]", "[8,32]"


def measure(workers: int, method: str, steps: int, device: str) -> dict[str, Any]:
    """Run the sweep from nothing with a number of workers; what it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "run.py", "sweep=custom", "model=minilm", f"method={method}", "task=snippets"),
            f"sweep.space={{train.lr:{{choice:{_RATES}}},train.batch_size:{{choice:{_ROWS}}}}}",
            *("sweep.sampler=grid", "sweep.trials=6", "sweep.study=packed", f"sweep.workers={workers}"),
            *(f"sweep.device_share={1 / workers}", f"sweep.storage={folder}/studies.db", f"results_dir={folder}"),
            *(f"work_dir={folder}/work", f"protocol.max_steps={steps}", f"protocol.eval_steps={steps}"),
            *("data.max_train=2000", "data.max_eval=200", f"train.device={device}", "quiet=true"),
        ]
        with _measure_busy(device) as busy:
            began = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True)
            wall = time.monotonic() - began
        trials = load_study(f"{folder}/studies.db", "packed").trials
    spans = [trial.duration.total_seconds() for trial in trials if trial.duration is not None]
    return {
        "workers": workers,
        "trials": len(trials),
        "wall_seconds": round(wall, 1),
        "mean_trial_seconds": round(sum(spans) / len(spans), 1),
        "busy": round(busy[0], 3),
        "values": [trial.value for trial in sorted(trials, key=lambda one: sorted(one.params.items()))],
    }


@contextmanager
def _measure_busy(device: str) -> Iterator[list[float]]:
    """Within: how busy the device is; the share is in the list afterwards."""
    found: list[float] = []
    if device == "cpu":
        psutil.cpu_percent(None)
        yield found
        found.append(psutil.cpu_percent(None) / 100)
        return
    stop, samples = threading.Event(), []

    def sample() -> None:
        while not stop.wait(1.0):
            samples.append(torch.cuda.utilization() / 100)  # needs the package nvidia-ml-py

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    found.append(sum(samples) / max(1, len(samples)))


def main() -> int:
    """The command line: measure each number of workers in turn, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/studies/packed_trials.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="at most 6, the number of trials")
    parser.add_argument("--method", default="sparsegrad")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    environment = describe_environment(torch.device(options.device))
    rows = []
    for workers in options.workers:
        rows.append(measure(workers, options.method, options.steps, options.device))
        print(rows[-1], flush=True)
        write_json(options.out, {"environment": environment, "method": options.method, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
