"""The GLUE tasks, from the hub or from local files."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from sparsegrad.assets import hub_data as hub
from sparsegrad.errors import check_choice
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
    # MNLI has two validation splits; this is the one of the same genres as the training rows.
    parts = ("train", "validation_matched" if task.name == "mnli" else "validation")
    otherwise = (
        f"use data.dir=<folder> with {task.name}/train.jsonl and validation.jsonl, or with "
        f"{OFFICIAL[task.name].folder}/train.tsv of the official GLUE zip, or task=snippets"
    )
    found = hub.read_dataset(HUB_NAME, {part: f"{task.name}/{part}-*.parquet" for part in parts}, otherwise)
    return Splits(_select_columns(task, found[parts[0]]), _select_columns(task, found[parts[1]]))


def _select_columns(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep the task's columns, with labels of the same type as from files."""
    return rows.select_columns([*task.columns, "label"]).cast_column("label", label_kind(task))
