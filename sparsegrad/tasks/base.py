"""The base class of tasks: labelled texts, how they are loaded, and how they are tokenized."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datasets

from sparsegrad.errors import UserError, check_choice, check_integer, check_number, fail
from sparsegrad.progress import job
from sparsegrad.tasks.subsets import split_heldout, subset

PAD_MODES = ("longest", "max_length")
_FINGERPRINT_ROWS = 1000


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, how many are used and how they are padded (conf node `data:`).

    Attributes:
        dir: folder with local files; None: the hub (GLUE, OASST1) or an asset (snippets, alpaca).
        pad: `longest` pads each batch to its longest row; `max_length` pads every row, as in the paper.
        max_length: tokens per row, special tokens included; longer rows are truncated.
        max_train, max_eval: rows kept after a fixed shuffle; None, or more than exist: all.
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

    @property
    def place(self) -> str:
        """` of data.dir=...` for error messages; empty for the default source."""
        return "" if self.dir is None else f" of data.dir={self.dir}"


@dataclass(frozen=True)
class Splits:
    """The two parts of a task's data.

    Attributes:
        train, validation: rows with the task's text columns and `label` (conversations: see `LanguageTask`).
        counts: what the source contains and what was left out, for the record.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    counts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of texts and labels of both splits, in order; independent of where they were read from."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            columns = sorted(part.column_names)
            digest.update(json.dumps([len(part), columns]).encode())
            for batch in part.iter(_FINGERPRINT_ROWS):  # in blocks: the whole split as one JSON text is too large
                digest.update(json.dumps([batch[column] for column in columns]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text classification or regression task; subclasses define where the rows come from.

    Attributes:
        name: of the task; names its records and cells.
        columns: one or two text columns.
        main_metric: the score that selects the checkpoint.
        eval_base: the authors' evaluation interval, in steps at batch size 16.
        labels: names in the order of their ids; empty: a regression.
        label_range: smallest and largest label of a regression.
        metric: configuration of `sparsegrad.metrics`; empty: the first that computes `main_metric`.
    """

    name: str
    columns: tuple[str, ...]
    main_metric: str
    eval_base: int
    labels: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    metric: str = ""

    def __post_init__(self) -> None:
        for name in ("columns", "labels", "label_range"):  # YAML has no tuples, and lists cannot be hashed
            value = getattr(self, name)
            if isinstance(value, str):
                raise fail(f"task.{name}", value, "give a list", f"such as task.{name}=[{value}]")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if len(self.columns) not in (1, 2):
            raise fail("task.columns", list(self.columns), "give one or two text columns")
        check_texts("task.columns", self.columns)
        check_texts("task.labels", self.labels)
        if len(self.labels) == 1:
            raise fail("task.labels", list(self.labels), "give at least two labels, or none for a regression")
        if self.label_range is not None and (self.labels or len(self.label_range) != 2):
            raise fail("task.label_range", list(self.label_range), "give [lowest, highest], for a regression only")
        for bound in self.label_range or ():
            check_number("task.label_range", bound)
        check_integer("task.eval_base", self.eval_base, at_least=1)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers on a scale."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Number of outputs of the model's head: one per label, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def label_help(self) -> str:
        """The allowed labels, as text for error messages."""
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
        """Convert a label from a file to its id, or for a regression to its number; None if it does not fit."""
        if isinstance(raw, bool):  # a bool is an int in Python, but no label
            return None
        if self.labels:
            return self._label_ids.get(raw) if isinstance(raw, int | str) else None
        fits = isinstance(raw, int | float) and abs(raw) < 2.0**127 and math.isfinite(raw)  # float32 must hold it
        if fits and self.label_range is not None:
            fits = self.label_range[0] <= raw <= self.label_range[1]
        return float(raw) if fits else None

    @property
    def is_language(self) -> bool:
        """Whether the task trains a causal language model rather than a classifier."""
        return False

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher `main_metric` is better."""
        return True

    @property
    def token_facts(self) -> dict[str, Any]:
        """Settings besides rows and tokenizer that change the tokens; part of the name of a stored basis."""
        return {}

    def tokens(
        self, rows: datasets.Dataset, tokenizer: Any, data: DataConfig
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """Tokenize rows; returns the token data set and counts for the record."""
        return tokenize(rows, self, tokenizer, data), {}

    def heldout(self, train: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Split the training rows for protocol `heldout`; returns (train, held out)."""
        return split_heldout(train)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the function that turns a list of rows into a batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)  # type: ignore[no-any-return]

    def load(self, data: DataConfig) -> Splits:
        """Read both splits, check the labels, and keep `data.max_train` and `data.max_eval` rows.

        Raises:
            UserError: if the rows cannot be read, or a label does not fit the task.
        """
        found = self._read(data)
        for part, rows in (("train", found.train), ("validation", found.validation)):
            _check_rows(self, data, part, rows)
        return replace(
            found, train=subset(found.train, data.max_train), validation=subset(found.validation, data.max_eval)
        )

    def _read(self, data: DataConfig) -> Splits:
        raise UserError(
            f"task={self.name}: {type(self).__name__} does not define where its rows come from; "
            "set task._target_ to a class that does, such as sparsegrad.tasks.glue.Glue"
        )


def check_texts(name: str, values: Sequence[Any]) -> None:
    """Raise `UserError` unless every element of the list `name` is a non-blank string.

    YAML reads an unquoted no, yes, on, off, null or number as another type: `[no, en]` becomes `[False, 'en']`.
    """
    for position, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            kind = "is blank" if isinstance(value, str) else f"is a {type(value).__name__}, not a text"
            raise fail(
                name, list(values), f"element {position} ({value!r}) {kind}", "write it in quotes, such as 'no' or '1'"
            )


def make_dataset(task: Task, rows: dict[str, list[Any]]) -> datasets.Dataset:
    """Make a data set of columns of equal length: texts as string, `label` as int64, or float32 for a regression."""
    kinds = dict.fromkeys(task.columns, datasets.Value("string")) | {"label": label_kind(task)}
    return datasets.Dataset.from_dict({name: rows[name] for name in kinds}, features=datasets.Features(kinds))


def label_kind(task: Task) -> datasets.Value:
    """Return the stored type of the labels; the hub has float32, so all sources give the same numbers."""
    return datasets.Value("float32" if task.is_regression else "int64")


def tokenize(dataset: datasets.Dataset, task: Task, tokenizer: Any, data: DataConfig) -> datasets.Dataset:
    """Tokenize texts to input_ids, attention_mask, labels and, for some models, token_type_ids.

    A row has at most `data.max_length` tokens. Rows are padded here only for data.pad=max_length; otherwise the
    collator pads each batch.

    Raises:
        UserError: if the tokenizer cannot handle `data.max_length` or `data.pad`.
    """
    check_tokenizer_fits(tokenizer, data)
    padding = "max_length" if data.pad == "max_length" else False

    with job("tokenizing", len(dataset), unit="rows") as bar:

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in task.columns]
            bar.step(len(texts[0]))
            return dict(tokenizer(*texts, truncation=True, max_length=data.max_length, padding=padding))

        tokens = dataset.map(
            encode,
            batched=True,
            remove_columns=list(task.columns),
            keep_in_memory=True,  # otherwise every run of a sweep leaves a cache file
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # nothing is cached; the default would pickle the tokenizer to hash it
        )
    return tokens.rename_column("label", "labels")


def check_tokenizer_fits(tokenizer: Any, data: DataConfig) -> None:
    """Raise `UserError` if rows would be longer than the tokenizer allows, or it cannot pad."""
    limit = tokenizer.model_max_length
    if data.max_length > limit:
        raise fail("data.max_length", data.max_length, f"this model's tokenizer allows at most {limit} tokens")
    if data.pad == "max_length" and tokenizer.pad_token is None:
        remedy = "name one that has with model.tokenizer=, or for a language task use data.pad=longest"
        raise fail("data.pad", data.pad, "this tokenizer has no padding token", remedy)


def _check_rows(task: Task, data: DataConfig, part: str, rows: datasets.Dataset) -> None:
    if not len(rows):
        raise UserError(
            f"task={task.name}: the {part} split{data.place} has no rows, and each needs at least one; give more rows"
        )
    wrong = sorted(value for value in rows.unique("label") if task.label_value(value) is None)
    if wrong:
        labels = ", ".join(map(str, wrong[:5]))
        raise UserError(
            f"task={task.name}: the {part} split{data.place} has the label {labels}; allowed is {task.label_help}"
        )
