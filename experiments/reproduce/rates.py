"""Choose the learning rate of each method in the mini tables on held-out rows.

    python run.py -m experiment=mini_grid task=snippets,stsb method=... train.lr=...     # the runs
    python -m experiments.reproduce.rates                                                # the choice

The chosen rate has the best mean held-out score over the tasks of the grid; the validation split is not used. A rate
whose run diverged on a task cannot be chosen. If the best rate is the smallest or largest one (`at_edge`), run the next
rate, a factor of 3 further; a further rate counts once all tasks have it. `hparams=mini` reads the result.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.runs.records import read_record

TASKS = ("snippets", "stsb")
RATES = (5e-5, 1.5e-4, 5e-4)
METHODS = ("full", "lora", "lora_tuned", "meprop", "sparsegrad", "sparsegrad_authors", "sparsegrad_fast")

Scores = dict[str, dict[float, dict[str, float | None]]]
"""Method -> rate -> task -> held-out score; None for a diverged run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the records of the grid, print and write the choice. Status 1 if runs are missing, 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce.rates", description=__doc__.splitlines()[0])
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        records = [read_record(path) for path in sorted((options.results_dir / "runs" / "mini_grid").glob("*.json"))]
        found = choose(scores(records))
        write_json(options.results_dir / "mini_rates.json", found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for method, one in found["methods"].items():
        print(f"{method:20} {'missing: ' + ', '.join(one['missing']) if one['lr'] is None else one['lr']}")
    return 1 if any(one["lr"] is None for one in found["methods"].values()) else 0


def scores(records: Iterable[Mapping[str, Any]]) -> Scores:
    """The held-out score of each run of the grid.

    Raises:
        UserError: for a record not chosen on held-out rows, or two records of one cell that disagree.
    """
    found: Scores = defaultdict(lambda: defaultdict(dict))
    for record in records:
        config = record["config"]
        method, task, rate = config["method"]["name"], config["task"]["name"], float(config["train"]["lr"])
        if config["protocol"]["select"] != "heldout":
            raise UserError(f"record {record['key']} of the grid was chosen on validation rows: the grid needs heldout")
        score = record["result"]["chosen_score"] if record["status"] == "complete" else None
        if found[method][rate].setdefault(task, score) != score:
            raise UserError(f"two records for {method} / {task} at {rate:g} disagree: delete one (key {record['key']})")
    return found


def choose(found: Scores, tasks: Sequence[str] = TASKS, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """The choice for every method, with the scores that it is based on."""
    return {
        "rule": "best mean of the held-out scores over the tasks; a diverged run disqualifies its rate",
        "tasks": list(tasks),
        "rates": list(rates),
        "methods": {method: _choose(found.get(method, {}), tasks, rates) for method in METHODS},
    }


def _choose(of: Mapping[float, Mapping[str, float | None]], tasks: Sequence[str], rates: Sequence[float]) -> Any:
    # Nothing is chosen before the planned grid is complete; further rates are optional.
    missing = [f"{task} at {rate:g}" for rate in rates for task in tasks if task not in of.get(rate, {})]
    rates = sorted({*rates, *(rate for rate in of if all(task in of[rate] for task in tasks))})
    table = {f"{rate:g}": dict(sorted(of[rate].items())) for rate in rates if rate in of}
    means = {rate: _mean([of[rate][task] for task in tasks]) for rate in rates} if not missing else {}
    whole = {rate: mean for rate, mean in means.items() if mean is not None}
    best = max(whole, key=lambda rate: whole[rate]) if whole else None
    return {
        "lr": best,
        "at_edge": best in (rates[0], rates[-1]),
        "mean": {f"{rate:g}": mean for rate, mean in means.items()},
        "scores": table,
        "missing": missing,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if a run diverged."""
    finite = [value for value in values if value is not None]
    return round(sum(finite) / len(finite), 6) if len(finite) == len(values) else None


if __name__ == "__main__":
    sys.exit(main())
