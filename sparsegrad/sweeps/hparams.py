"""`hparams=paper|authors|search|study:NAME`: hyperparameters from a table or a study, instead of by hand."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparsegrad.errors import UserError, did_you_mean, fail
from sparsegrad.runs.overrides import list_given
from sparsegrad.sweeps.search_results import read_search

FOLDER = Path(__file__).parent / "published"
STUDY = "study:"
COLUMNS = {
    "paper": ("table", "model", "method", "task", "batch_size", "lr"),
    "authors": (
        "model", "method", "task", "batch_size", "lr", "optuna_batch_size", "optuna_lr", "optuna_value",
    ),
}  # fmt: skip
# Variants of a method that share one line in the tables.
FAMILY = {"sparsegrad_authors": "sparsegrad", "sparsegrad_fast": "sparsegrad"}
# The authors did not search for MeProp: their BERT runs use the values of SparseGrad, and so do ours for RoBERTa.
STAND_IN = {"meprop": "sparsegrad"}
SEARCH = "search"
STORAGE = "SPARSEGRAD_STORAGE"  # the variable of the environment that names the storage of studies
# Two ways to give the size of a method, of which it takes one.
_OTHER_SIZE = {"method.density": "method.keep", "method.keep": "method.density"}


def apply(composed: DictConfig, by_hand: Collection[str] | None = None) -> dict[str, Any]:
    """Set the values that `hparams` names in `composed`; keys set on the command line keep their value.

    Args:
        composed: the configuration, changed in place.
        by_hand: keys that are not changed; None: those that the command line of this process sets.

    Returns:
        The source of the values, and the values that were used, for the record.

    Raises:
        UserError: if there are no values for this model, method and task.
    """
    name, facts = str(composed.hparams), dict[str, Any]()
    kept = list_given() if by_hand is None else by_hand
    if name == SEARCH:
        values, facts = read_search(composed, kept)
    elif name.startswith(STUDY):
        values = _read_study(composed, name.removeprefix(STUDY))
    else:
        values = _read_file(composed, name)
    taken = {key: value for key, value in values.items() if key not in kept and not _has_size(composed, key, kept)}
    set_values(composed, taken)
    return {"from": name, **facts, **taken}


def _has_size(composed: DictConfig, key: str, by_hand: Collection[str]) -> bool:
    """Whether the command line gives the method's size in the other way than `key` does."""
    other = _OTHER_SIZE.get(key)
    return other is not None and other in by_hand and OmegaConf.select(composed, other) is not None


def set_values(composed: DictConfig, values: Mapping[str, Any]) -> None:
    """Set values by dotted key, in place; a size of the method takes the place of the one given the other way."""
    for key, value in values.items():
        OmegaConf.update(composed, key, value)
        other = _OTHER_SIZE.get(key)
        if value is not None and other is not None and OmegaConf.select(composed, other) is not None:
            OmegaConf.update(composed, other, None)


def default_storage(results_dir: str) -> str:
    """Return the storage of studies if `sweep.storage` is not set; the same rule as in conf/sweep/custom.yaml."""
    return os.environ.get(STORAGE) or default_file(results_dir)


def default_file(results_dir: str) -> str:
    """Return the storage of studies if the environment names none either."""
    return f"{results_dir}/studies/studies.db"


def read_rows(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """Read one table of published values, `paper` or `authors`.

    Raises:
        UserError: if the file cannot be read, or has other columns than expected.
    """
    path = folder / f"{name}.csv"
    try:
        with path.open(newline="") as lines:
            reader = csv.DictReader(lines)
            rows, found = list(reader), tuple(reader.fieldnames or ())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it, or install sparsegrad again") from None
    if found != COLUMNS[name]:
        wrong = ", ".join(sorted(set(found) ^ set(COLUMNS[name])) or found)
        raise UserError(f"{path} has wrong columns ({wrong}): it needs exactly {', '.join(COLUMNS[name])}")
    return rows


def find(rows: list[dict[str, str]], model: str, method: str, task: str) -> dict[str, str] | None:
    """Return the row of one model, method and task; None if there is none."""
    wanted = (model, FAMILY.get(method, method), task)
    return next((row for row in rows if (row["model"], row["method"], row["task"]) == wanted), None)


def _name_cell(composed: DictConfig) -> tuple[str, str, str]:
    return composed.model.name, composed.method.name, composed.task.name


def _read_file(composed: DictConfig, name: str) -> dict[str, Any]:
    if name not in COLUMNS:
        hint = did_you_mean(name, [*COLUMNS, SEARCH])
        raise fail("hparams", name, "choose paper, authors, search or study:NAME", hint)
    rows, (model, method, task) = read_rows(name), _name_cell(composed)
    row = find(rows, model, method, task) or find(rows, model, STAND_IN.get(method, method), task)
    if row is None:
        known = sorted({f"{row['model']}/{row['method']}" for row in rows})
        raise UserError(
            f"hparams={name} has nothing for {' / '.join(_name_cell(composed))}: it has the GLUE tasks for "
            f"{', '.join(known)}; give lr= and batch_size= instead, or search with sweep=quick"
        )
    return {"train.batch_size": int(row["batch_size"]), "train.lr": float(row["lr"])}


def _read_study(composed: DictConfig, name: str) -> dict[str, Any]:
    from sparsegrad.sweeps.ledger import find_winner  # here: published values need no Optuna
    from sparsegrad.sweeps.study import LABELS, load_study

    study = load_study(default_storage(composed.results_dir), name)
    labels = study.user_attrs.get(LABELS, {})
    found, wanted = tuple(labels.get(key) for key in ("model", "method", "task")), _name_cell(composed)
    if found != wanted:
        raise UserError(
            f"study {name} searched {' / '.join(map(str, found))}, this run is {' / '.join(wanted)}: choose another "
            "study, or search with sweep=quick"
        )
    best = find_winner(study)
    if best is None:
        raise UserError(f"study {name} has no completed trial yet: run its sweep first")
    return best.params
