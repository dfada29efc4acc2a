"""Compare how soon samplers find a good learning rate, with the authors' 81 Optuna studies as surrogates.

    python -m experiments.studies.samplers

Nothing is trained. A proposed (batch size, learning rate) gets the score of the nearest completed trial of the same
study: same batch size, nearest learning rate on the logarithmic scale. Samplers are compared by the number of trials
until a score is within 0.5 points of the study's best recorded score. The replay has limitations: TPE
proposed most recorded trials, so the surrogate is fine-grained only where TPE searched, and scores contain the noise of
single runs, as in any search.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
import warnings
from bisect import bisect_left
from collections import defaultdict
from math import log
from pathlib import Path

import optuna

from experiments.paths import DATA, ROOT
from sparsegrad.files import write_json
from sparsegrad.sweeps.samplers import sampler
from sparsegrad.sweeps.space import Dimension, Space

TRIALS = DATA / "authors_trials.csv"
SPACE = Space(
    (
        Dimension(key="train.batch_size", kind="choice", values=(16, 32)),
        Dimension(key="train.lr", kind="float", values=(1e-6, 1e-1), log=True),
    )
)
SAMPLERS = ("tpe", "gp", "qmc", "random")
TOLERANCE = 0.005  # scores are from 0 to 1
FEWEST_TRIALS = 10


class Surrogate:
    """One recorded study as a function of batch size and learning rate."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.best = max(float(row["value"]) for row in rows)
        self._by_batch: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            self._by_batch[int(row["batch_size"])].append((log(float(row["lr"])), float(row["value"])))
        for points in self._by_batch.values():
            points.sort()

    def __call__(self, batch_size: int, lr: float) -> float:
        """The score of the nearest trial, or of the other batch size if this one was never tried."""
        points = self._by_batch.get(batch_size) or next(iter(self._by_batch.values()))
        place = bisect_left(points, (log(lr), 0.0))
        near = points[max(0, place - 1) : place + 1]  # the neighbours below and above
        return min(near, key=lambda point: abs(point[0] - log(lr)))[1]


def read_studies() -> dict[str, Surrogate]:
    """The studies that have at least `FEWEST_TRIALS` completed trials with at least two different scores."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with TRIALS.open(newline="") as file:
        for row in csv.DictReader(file):
            rows[row["study"]].append(row)
    kept = {name: found for name, found in rows.items() if len(found) >= FEWEST_TRIALS}
    return {name: Surrogate(found) for name, found in kept.items() if len({row["value"] for row in found}) > 1}


def trials_needed(surrogate: Surrogate, name: str, seed: int, most: int) -> int:
    """Number of trials until a score is within `TOLERANCE` of the best; `most` + 1 if none is."""
    study = optuna.create_study(direction="maximize", sampler=sampler(name, SPACE, seed, startup_trials=10))
    for count in range(1, most + 1):
        trial = study.ask(SPACE.distributions)
        value = surrogate(trial.params["train.batch_size"], trial.params["train.lr"])
        if value >= surrogate.best - TOLERANCE:
            return count
        study.tell(trial, value)
    return most + 1


def check(name: str, studies: dict[str, Surrogate], seeds: int, most: int) -> dict[str, float | int]:
    """Results of one sampler over all studies and seeds."""
    started = time.monotonic()
    needed = [[trials_needed(one, name, seed, most) for seed in range(seeds)] for one in studies.values()]
    every = [count for counts in needed for count in counts]
    return {
        "median_over_studies": statistics.median(statistics.median(counts) for counts in needed),
        "mean": round(statistics.mean(every), 2),
        "share_found": round(sum(count <= most for count in every) / len(every), 3),
        "share_found_in_20": round(sum(count <= 20 for count in every) / len(every), 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """The command line: compare the samplers, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/studies/sampler_check.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=40)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore")
    studies = read_studies()
    found = {}
    for name in SAMPLERS:
        found[name] = check(name, studies, options.seeds, options.trials)
        print(name, json.dumps(found[name]), flush=True)
    facts = {"studies": len(studies), "seeds": options.seeds, "most_trials": options.trials, "tolerance": TOLERANCE}
    surrogate = "nearest completed trial of the same batch size on the logarithm of the learning rate"
    write_json(options.out, {**facts, "surrogate": surrogate, "optuna": optuna.__version__, "samplers": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
