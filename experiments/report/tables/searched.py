"""Tables 13-15: the best batch size and learning rate per task, next to the published values and the authors'.

`python -m experiments.report.tables.searched` (`make sweep-table`) prints them from the storage of studies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from sparsegrad.errors import UserError
from sparsegrad.sweeps.hparams import default_file, default_storage, find, read_rows
from sparsegrad.sweeps.ledger import find_winner
from sparsegrad.sweeps.search_plans import COMMITTED
from sparsegrad.sweeps.storage import Store, find_file, open_existing_store
from sparsegrad.sweeps.study import LABELS, quiet

HEADER = (
    "table",
    "model",
    "method",
    "task",
    "published",
    "authors' code",
    "authors' search",
    "found here",
    "score",
    "study",
)


def rows(store: Store | None) -> list[list[str]]:
    """One row per published line, then one per other study; cells without a search are blank."""
    published, authors = read_rows("paper"), read_rows("authors")
    studies = list(_studies(store)) if store is not None else []
    lines = [[row["table"], row["model"], row["method"], row["task"], _pair(row)] for row in published]
    known = {tuple(line[1:4]) for line in lines}
    lines += [["", *names, ""] for names in sorted({names for names, _ in studies} - known)]
    return [_fill_row(line, authors, dict(_best_of(studies, tuple(line[1:4])))) for line in lines]


def _fill_row(line: list[str], authors: list[dict[str, str]], best: dict[str, str]) -> list[str]:
    row = find(authors, line[1], line[2], line[3])
    theirs = [_pair(row), _pair(row, "optuna_")] if row else ["", ""]
    return [*line, *theirs, best.get("values", ""), best.get("score", ""), best.get("study", "")]


def _studies(store: Store) -> Iterator[tuple[tuple[str, ...], Any]]:
    """((model, method, task), study) of each study with labels and a completed trial."""
    for name in optuna.get_all_study_names(store.storage):
        study = optuna.load_study(study_name=name, storage=store.storage)
        labels = study.user_attrs.get(LABELS)
        if labels and study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            yield (labels["model"], labels["method"], labels["task"]), study


def _best_of(studies: list[tuple[tuple[str, ...], Any]], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Values, score and name of the study with the most trials for this model, method and task."""
    found = [study for of, study in studies if of == names]
    if not found:
        return
    study = max(found, key=lambda one: len(one.get_trials(deepcopy=False)))
    best = find_winner(study)
    assert best is not None  # only studies with a completed trial are in the table
    batch, rate = best.params.get("train.batch_size"), best.params.get("train.lr")
    yield "values", f"{'' if batch is None else batch} / {'' if rate is None else f'{rate:.2e}'}"
    yield "score", f"{best.value:.4f}"
    yield "study", study.study_name


def _pair(row: dict[str, str], prefix: str = "") -> str:
    batch, rate = row[f"{prefix}batch_size"], row[f"{prefix}lr"]
    return f"{batch} / {float(rate):.2e}" if rate else ""


def _open(where: str) -> Store | None:
    """The storage; None without a file of this checkout's own studies: the table of published values needs none."""
    file = find_file(where)
    if where == default_file(COMMITTED) and file is not None and not file.is_file():
        return None
    return open_existing_store(where)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown: status 0, or 2 and one line with the remedy after bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report.tables.searched", description="Tables 13-15.")
    parser.add_argument(
        "--storage", help="storage as in sweep.storage (default: SPARSEGRAD_STORAGE or the results folder)"
    )
    parser.add_argument("--results-dir", default=COMMITTED)
    options = parser.parse_args(arguments)
    quiet()
    try:
        lines = rows(_open(options.storage or default_storage(options.results_dir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
