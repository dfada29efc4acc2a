"""The GLUE tasks, from the hub or from local files."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from sparsegrad.assets import hub_data as hub
from sparsegrad.errors import UserError, check_choice
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
        f"{OFFICIAL[task.name].folder}/train.tsv of the official GLUE zip, or task=snippets, which needs no hub"
    )
    found = hub.read_dataset(HUB_NAME, {part: f"{task.name}/{part}-*.parquet" for part in parts}, otherwise)
    return Splits(_select_columns(task, found[parts[0]]), _select_columns(task, found[parts[1]]))


def _select_columns(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep the task's columns, with labels of the same type as from files.

    Raises:
        UserError: if a column is missing, or the data set names its labels otherwise or in another order.
    """
    missing = [name for name in (*task.columns, "label") if name not in rows.column_names]
    if missing:
        raise UserError(
            f"task={task.name}: the data set {HUB_NAME} has no column {', '.join(missing)}, only "
            f"{', '.join(rows.column_names)}; correct task.columns, or use data.dir=<folder>"
        )
    names = getattr(rows.features["label"], "names", None)  # of a ClassLabel; plain integers have none
    if names is not None and tuple(names) != task.labels:
        raise UserError(
            f"task={task.name}: the data set {HUB_NAME} has the labels {', '.join(names)}, and task.labels is "
            f"{', '.join(task.labels) or 'empty, a regression'}: every label would be another one; set "
            f"task.labels=[{','.join(names)}]"
        )
    return rows.select_columns([*task.columns, "label"]).cast_column("label", label_kind(task))
