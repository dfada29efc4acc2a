"""Tables 13-15: the best batch size and learning rate per task, beside the published ones and the authors' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna
from optuna.trial import TrialState

from sparsegrad.sweeps.hparams import FILES, find, read_rows
from sparsegrad.sweeps.storage import Store
from sparsegrad.sweeps.study import LABELS

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
    """One row for each published line, then one for each study of something else; blank where nothing was searched."""
    published, authors = read_rows(FILES["paper"]), read_rows(FILES["authors"])
    studies = list(_studies(store)) if store is not None else []
    lines = [[row["table"], row["model"], row["method"], row["task"], _pair(row)] for row in published]
    known = {tuple(line[1:4]) for line in lines}
    lines += [["", *names, ""] for names in sorted({names for names, _ in studies} - known)]
    return [_filled(line, authors, dict(_best_of(studies, tuple(line[1:4])))) for line in lines]


def _filled(line: list[str], authors: list[dict[str, str]], best: dict[str, str]) -> list[str]:
    row = find(authors, line[1], line[2], line[3])
    theirs = [_pair(row), _pair(row, "optuna_")] if row else ["", ""]
    return [*line, *theirs, best.get("values", ""), best.get("score", ""), best.get("study", "")]


def _studies(store: Store) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(model, method, task) and summary of each study that has a completed trial of batch size and learning rate."""
    for name in optuna.get_all_study_names(store.storage):
        study = optuna.load_study(study_name=name, storage=store.storage)
        labels = study.user_attrs.get(LABELS)
        if labels and study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            yield (labels["model"], labels["method"], labels["task"]), study


def _best_of(studies: list[tuple[tuple[str, ...], Any]], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The study with most trials speaks for its model, method and task."""
    found = [study for of, study in studies if of == names]
    if not found:
        return
    study = max(found, key=lambda one: len(one.get_trials(deepcopy=False)))
    best = study.best_trial
    batch, rate = best.params.get("train.batch_size"), best.params.get("train.lr")
    yield "values", f"{'' if batch is None else batch} / {'' if rate is None else f'{rate:.2e}'}"
    yield "score", f"{best.value:.4f}"
    yield "study", study.study_name


def _pair(row: dict[str, str], prefix: str = "") -> str:
    batch, rate = row[f"{prefix}batch_size"], row[f"{prefix}lr"]
    return f"{batch} / {float(rate):.2e}" if rate else ""
