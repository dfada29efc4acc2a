"""What a task is: labelled texts, how they are loaded, how they become tokens."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from sparsegrad.errors import UserError, check_choice, check_integer, fail

PAD_MODES = ("longest", "max_length")
# Every subset and held-out part comes from this one seed, so that runs with different seeds see the same rows.
SPLIT_SEED = 20240507
_FINGERPRINT_ROWS = 1000


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, how many are used and how they are padded (conf node `data:`).

    dir: folder with local files; None = the hub (GLUE) or the fetched asset (snippets).
    pad: "longest" pads each batch to its longest row; "max_length" pads every row, as the paper did.
    max_length: tokens per row, special tokens included; longer rows are truncated.
    max_train, max_eval: rows kept after a fixed shuffle; None, or more than there are, = all.
    """

    dir: str | None = None
    pad: str = "longest"
    max_length: int = 128
    max_train: int | None = None
    max_eval: int | None = None

    def __post_init__(self) -> None:
        if self.dir is not None and (not isinstance(self.dir, str) or not self.dir.strip()):
            raise fail("data.dir", repr(self.dir), "give a folder, or null for the default source")
        check_choice("data.pad", self.pad, PAD_MODES)
        check_integer("data.max_length", self.max_length, at_least=4)
        for name in ("max_train", "max_eval"):
            if getattr(self, name) is not None:
                check_integer(f"data.{name}", getattr(self, name), at_least=1, remedy="null means all rows")


@dataclass(frozen=True)
class Splits:
    """The two parts of a task; the columns are the task's text columns and `label`, nothing else.

    counts: what the source had and what was left out, for the record.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    counts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over texts and labels of both splits, in order; where they were read from has no part in it."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            columns = sorted(part.column_names)
            digest.update(json.dumps([len(part), columns]).encode())
            for batch in part.iter(_FINGERPRINT_ROWS):
                digest.update(json.dumps([batch[column] for column in columns]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text classification or regression task; subclasses say where the rows come from.

    columns: one or two text columns.  labels: names in the order of their ids; empty = regression.
    main_metric: the score that selects models.  eval_base: the authors' evaluation interval, in steps.
    label_range: smallest and largest label of a regression.
    metric: configuration of `sparsegrad.metrics`; empty = the one that belongs to `main_metric`.
    """

    name: str
    columns: tuple[str, ...]
    main_metric: str
    eval_base: int
    labels: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    metric: str = ""

    def __post_init__(self) -> None:
        for name in ("columns", "labels", "label_range"):  # YAML has lists only
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if len(self.columns) not in (1, 2):
            raise fail("task.columns", list(self.columns), "give one or two text columns")
        if len(self.labels) == 1:
            raise fail("task.labels", list(self.labels), "give at least two labels, or none for a regression")
        if self.label_range is not None and (self.labels or len(self.label_range) != 2):
            raise fail("task.label_range", list(self.label_range), "give [lowest, highest], for a regression only")
        check_integer("task.eval_base", self.eval_base, at_least=1)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers on a scale."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one per label, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def label_help(self) -> str:
        """The labels that are allowed, in words."""
        if self.labels:
            return "one of " + ", ".join(f"{index} ({label})" for index, label in enumerate(self.labels))
        if self.label_range is None:
            return "a number"
        return "a number from {:g} to {:g}".format(*self.label_range)

    @cached_property
    def _label_ids(self) -> dict[Any, int]:
        names = {label: index for index, label in enumerate(self.labels)}
        return names | {index: index for index in range(len(self.labels))}

    def label_value(self, raw: Any) -> int | float | None:
        """The id (or, for a regression, the number) of a label as found in a file; None where it does not fit."""
        if isinstance(raw, bool):
            return None
        if self.labels:
            return self._label_ids.get(raw) if isinstance(raw, int | str) else None
        fits = isinstance(raw, int | float) and abs(raw) < 2.0**127 and math.isfinite(raw)  # float32 has to hold it
        if fits and self.label_range is not None:
            fits = self.label_range[0] <= raw <= self.label_range[1]
        return float(raw) if fits else None

    @property
    def is_language(self) -> bool:
        """Whether a causal language model is trained on it, instead of a classifier."""
        return False

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher `main_metric` is better."""
        return True

    @property
    def token_facts(self) -> dict[str, Any]:
        """What else than the rows and the tokenizer decides about the tokens, for the name of a stored basis."""
        return {}

    def tokens(
        self, rows: datasets.Dataset, tokenizer: Any, data: DataConfig
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """Rows as the model takes them, and what there is to say about them, for the record."""
        return tokenize(rows, self, tokenizer, data), {}

    def heldout(self, train: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """(train, held out) of protocol `heldout`."""
        return split_heldout(train)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Rows -> batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)  # type: ignore[no-any-return]

    def load(self, data: DataConfig) -> Splits:
        """Read both splits, check the labels, keep `data.max_train` and `data.max_eval` rows.

        Raises UserError where the rows cannot be read or a label does not fit the task.
        """
        found = self._read(data)
        for part, rows in (("train", found.train), ("validation", found.validation)):
            _check_rows(self, part, rows)
        return replace(
            found, train=subset(found.train, data.max_train), validation=subset(found.validation, data.max_eval)
        )

    def _read(self, data: DataConfig) -> Splits:
        raise UserError(
            f"task={self.name}: {type(self).__name__} does not say where its rows are; "
            "set task._target_ to sparsegrad.tasks.glue.Glue or sparsegrad.tasks.snippets.Snippets"
        )


def make_dataset(task: Task, rows: dict[str, list[Any]]) -> datasets.Dataset:
    """Columns of equal length -> Dataset with text columns as string, `label` as int64 (float32 for a regression)."""
    kinds = dict.fromkeys(task.columns, datasets.Value("string")) | {"label": label_kind(task)}
    return datasets.Dataset.from_dict({name: rows[name] for name in kinds}, features=datasets.Features(kinds))


def label_kind(task: Task) -> datasets.Value:
    """The stored type of the labels; float32 is what the hub has, so all sources give the same numbers."""
    return datasets.Value("float32" if task.is_regression else "int64")


def split_heldout(train: datasets.Dataset, share: float = 0.1) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Protocol `heldout`: (train, held out), the same `share` of the rows in every run, each part in the file's order.

    Raises UserError if one of the parts would be empty.
    """
    count = round(len(train) * share)
    if not 0 < count < len(train):
        raise UserError(
            f"{len(train)} training rows cannot give a held-out share of {share:g}: at least "
            f"{math.ceil(1 / share) if 0 < share < 1 else 2} rows are needed; raise data.max_train"
        )
    order = _order(len(train))
    return train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))


def tokenize(dataset: datasets.Dataset, task: Task, tokenizer: Any, data: DataConfig) -> datasets.Dataset:
    """Texts -> input_ids, attention_mask, (token_type_ids,) labels; at most `data.max_length` tokens a row.

    Rows are padded here only for data.pad=max_length; otherwise the collator pads each batch.
    The result stays in memory: no cache files pile up, one per run of a sweep.
    """
    check_tokenizer(tokenizer, data)
    padding = "max_length" if data.pad == "max_length" else False

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in task.columns]
        return dict(tokenizer(*texts, truncation=True, max_length=data.max_length, padding=padding))

    tokens = dataset.map(
        encode,
        batched=True,
        remove_columns=list(task.columns),
        keep_in_memory=True,
        load_from_cache_file=False,
        desc=f"tokenize {task.name}",
        new_fingerprint=uuid.uuid4().hex,  # nothing is cached by it; the default would pickle the tokenizer to hash it
    )
    return tokens.rename_column("label", "labels")


def check_tokenizer(tokenizer: Any, data: DataConfig) -> None:
    """Raise `UserError` for rows longer than the tokenizer takes, or padding that it cannot do."""
    limit = tokenizer.model_max_length
    if data.max_length > limit:
        raise fail("data.max_length", data.max_length, f"this model's tokenizer takes at most {limit} tokens")
    if data.pad == "max_length" and tokenizer.pad_token is None:
        raise fail("data.pad", data.pad, "this tokenizer has no padding token", "set tokenizer.pad_token first")


def _check_rows(task: Task, part: str, rows: datasets.Dataset) -> None:
    if not len(rows):
        raise UserError(f"task={task.name}: the {part} split has no rows; give a file with at least one")
    wrong = sorted(value for value in rows.unique("label") if task.label_value(value) is None)
    if wrong:
        shown = ", ".join(map(str, wrong[:5]))
        raise UserError(f"task={task.name}: the {part} split has the label {shown}; allowed is {task.label_help}")


def subset(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """`count` rows after a fixed shuffle; None, or more than there are: all."""
    return rows if count is None or count >= len(rows) else rows.select(_order(len(rows))[:count])


def _order(count: int) -> Any:
    # RandomState's stream is frozen by numpy's policy: the same rows on every machine and version.
    return np.random.RandomState(SPLIT_SEED).permutation(count)
