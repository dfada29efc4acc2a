"""Measure how busy the workers of a sweep are, with real worker processes and trials that sleep instead of training.

    python -m experiments.studies.sweep_utilisation

Each trial sleeps for 1 to 8 seconds, the value of its parameter. `busy` is the share of worker time spent in trials,
from the start of the first trial to the end of the last. `busy_while_trials_were_left` counts only the time from the
moment when every worker has a trial until the last trial starts. For comparison, `batch_synchronous_busy` is the share
that the same trials would reach in synchronous batches: each batch takes as long as its longest trial, without any
delay between batches.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from experiments.paths import CONF, ROOT
from sparsegrad.files import write_json
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import RunConfig
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.pool import start_workers
from sparsegrad.sweeps.study import open_study


def run(config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Stands in for `sparsegrad.runs.run`: sleeps for `train.lr` seconds."""
    time.sleep(config.train.lr)
    record = {"result": {"chosen_step": 1}, "evaluations": [{"step": 1, "accuracy": config.train.lr}], **labels}
    return record, True


def sweep(folder: Path, workers: int, trials: int) -> list[FrozenTrial]:
    """Run the sweep; returns its trials."""
    overrides = [
        "sweep=custom",
        "sweep.space={train.lr:{float:[1.0,8.0],log:true}}",
        "sweep.sampler=random",
        "sweep.runner=experiments.studies.sweep_utilisation.run",
        f"sweep.trials={trials}",
        f"results_dir={folder}",
    ]
    composed = compose_run(overrides, CONF)
    shared = open_study(make_plan(composed))
    for worker in start_workers(composed, workers):
        worker.join()
    return shared.study.trials


def seconds(first: datetime | None, last: datetime | None) -> float:
    """Seconds between two times."""
    assert first is not None
    assert last is not None
    return (last - first).total_seconds()


def busy_in_the_middle(trials: list[FrozenTrial], workers: int) -> float:
    """Busy share from the moment when every worker has its first trial until the last trial starts."""
    starts: dict[int, float] = {}
    spans = [(one.datetime_start, one.datetime_complete, one.user_attrs["worker"]["pid"]) for one in trials]
    zero = min(start for start, _, _ in spans if start is not None)
    times = [(seconds(zero, start), seconds(zero, end), pid) for start, end, pid in spans]
    for start, _, pid in times:
        starts[pid] = min(start, starts.get(pid, start))
    begin, stop = max(starts.values()), max(start for start, _, _ in times)
    # Time of each trial that falls into the window.
    inside = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end, _ in times)
    return inside / (workers * (stop - begin))


def figures(trials: list[FrozenTrial], workers: int) -> dict[str, Any]:
    """Busy shares of the sweep and of the same trials in batches."""
    lengths = [seconds(trial.datetime_start, trial.datetime_complete) for trial in trials]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete is not None]
    wall = seconds(min(trial.datetime_start for trial in trials if trial.datetime_start is not None), max(ends))
    batches = [lengths[start : start + workers] for start in range(0, len(lengths), workers)]
    together = sum(max(batch) for batch in batches)
    return {
        "workers": workers,
        "trials": len(trials),
        "shortest_trial_seconds": round(min(lengths), 2),
        "longest_trial_seconds": round(max(lengths), 2),
        "wall_seconds": round(wall, 2),
        "busy": round(sum(lengths) / (workers * wall), 4),
        "busy_while_trials_were_left": round(busy_in_the_middle(trials, workers), 4),
        "slept": round(sum(trial.params["train.lr"] for trial in trials) / (workers * wall), 4),
        "batch_synchronous_wall_seconds": round(together, 2),
        "batch_synchronous_busy": round(sum(lengths) / (workers * together), 4),
    }


def main() -> int:
    """The command line: measure, print and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/studies/utilisation.json")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(sweep(Path(folder), options.workers, options.trials), options.workers)
    print(found)
    write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
