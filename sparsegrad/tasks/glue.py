"""The GLUE tasks, from the hub or from local files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets

from sparsegrad.assets.hub import hub_answers
from sparsegrad.errors import UserError, check_choice, first_line
from sparsegrad.tasks.base import DataConfig, Splits, Task, label_kind
from sparsegrad.tasks.glue_files import OFFICIAL, read_local

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class Glue(Task):
    """One of the nine GLUE tasks; scored on the validation split (MNLI: matched), as the test labels are not public."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.name", self.name, tuple(OFFICIAL))

    def _read(self, data: DataConfig) -> Splits:
        return _read_hub(self) if data.dir is None else read_local(self, data.dir)


def _read_hub(task: Task) -> Splits:
    try:
        with _set_offline_unless(hub_answers()):
            found = datasets.load_dataset(HUB_NAME, task.name)
    except Exception as error:  # the hub's client raises many types; the remedy is the same for all
        raise _make_hub_error(task, error) from error
    # MNLI has two validation splits; this is the one of the same genres as the training rows.
    validation = "validation_matched" if task.name == "mnli" else "validation"
    return Splits(_select_columns(task, found["train"]), _select_columns(task, found[validation]))


def _select_columns(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep the task's columns, with labels of the same type as from files."""
    return rows.select_columns([*task.columns, "label"]).cast_column("label", label_kind(task))


@contextmanager
def _set_offline_unless(online: bool) -> Iterator[None]:
    """Let `datasets` read its cache without asking the hub, unless `online`: it would retry for about a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not online
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _make_hub_error(task: Task, error: Exception) -> UserError:
    prefetch = f"python -c \"import datasets; datasets.load_dataset('{HUB_NAME}', '{task.name}')\""
    return UserError(
        f"task={task.name}: {HUB_NAME} could not be loaded from the hub or its cache ({first_line(error)}); "
        f"with a network, fill the cache (in HF_HOME): {prefetch}; without one, use data.dir=<folder> with "
        f"{task.name}/train.jsonl and validation.jsonl, or with {OFFICIAL[task.name].folder}/train.tsv of the official "
        "GLUE zip, or task=snippets"
    )
