"""GLUE from local files: `<task>/*.jsonl` with the hub's columns, or the folders of the official zip."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from sparsegrad.errors import UserError, fail
from sparsegrad.tasks.base import Splits, Task, make_dataset


@dataclass(frozen=True)
class Official:
    """The files of one task in the official zip.

    Attributes:
        folder: of the task's files.
        texts: text columns by their names on the hub, with those in the file.
        label: name of the label in the file.
        dev: file of the validation split.
        header: the columns of a file without a header line; None: the first line is the header.
    """

    folder: str
    texts: Mapping[str, str]
    label: str = "label"
    dev: str = "dev.tsv"
    header: tuple[str, ...] | None = None


_ONE, _PAIR = {"sentence": "sentence"}, {"sentence1": "sentence1", "sentence2": "sentence2"}
OFFICIAL = {
    "cola": Official("CoLA", _ONE, header=("source", "label", "star", "sentence")),
    "sst2": Official("SST-2", _ONE),
    "mrpc": Official("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality"),
    "stsb": Official("STS-B", _PAIR, "score"),
    "qqp": Official("QQP", {"question1": "question1", "question2": "question2"}, "is_duplicate"),
    "mnli": Official("MNLI", {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label", "dev_matched.tsv"),
    "qnli": Official("QNLI", {"question": "question", "sentence": "sentence"}),
    "rte": Official("RTE", _PAIR),
    "wnli": Official("WNLI", _PAIR),
}
MAX_LINE = 2**24  # bytes; a file that is no text table may be a single line of gigabytes
# The published QQP has lines that an unquoted line break splits in two, and empty questions. The hub's copy drops the
# first and keeps the second; doing the same, with a warning, gives the same rows from every source.
FLAWED = ("qqp",)


@dataclass
class Rows:
    """The columns read so far, and the numbers of flawed lines that were skipped, or kept although `empty`."""

    task: Task
    path: Path
    columns: dict[str, list[Any]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.columns = {name: [] for name in (*self.task.columns, "label")}

    def add(self, number: int, texts: list[Any], label: Any) -> None:
        """Append line `number`; raise `UserError` with file and line if a value does not fit."""
        for name, text in zip(self.task.columns, texts, strict=True):
            self._check_text(number, name, text)
        value = self.task.label_value(label)
        if value is None:
            raise self.error(number, f"label {label!r} does not fit task={self.task.name}: give {self.task.label_help}")
        for name, text in zip(self.task.columns, texts, strict=True):
            self.columns[name].append(text)
        self.columns["label"].append(value)

    def _check_text(self, number: int, name: str, text: Any) -> None:
        if not isinstance(text, str):
            raise self.error(number, f"column {name} is {text!r}: give a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.error(number, f"column {name} is {text!r}: half a Unicode pair; write both halves") from None
        if not text.strip():
            if self.task.name not in FLAWED:
                raise self.error(number, f"column {name} is empty: give a text, or delete the line")
            self.empty.append(number)

    def error(self, number: int, what: str) -> UserError:
        """Build the error for line `number`; the caller raises it."""
        return UserError(f"{self.path} line {number}: {what}")

    def finish(self) -> datasets.Dataset:
        """Return the rows as a data set; warn once per kind of flaw.

        Raises:
            UserError: if there are none.
        """
        if not self.columns["label"]:
            raise UserError(f"{self.path} has no rows: give at least one")
        for numbers, what in (
            (self.skipped, "cut short and left out"),
            (self.empty, "with an empty question and kept"),
        ):
            if numbers:
                warnings.warn(
                    f"{self.path}: {len(numbers)} line(s) {what}, as in the hub's copy; the first is line {numbers[0]}",
                    stacklevel=2,
                )
        return make_dataset(self.task, self.columns)


def read_local(task: Task, folder: str) -> Splits:
    """Read both splits from `folder`; JSONL is preferred if both layouts exist.

    Raises:
        UserError: if neither layout is complete, or for the first malformed line.
    """
    root, official = Path(folder).expanduser(), OFFICIAL[task.name]
    jsonl, tsv = root / task.name, root / official.folder
    train, validation = jsonl / "train.jsonl", jsonl / "validation.jsonl"
    # The hub's name of MNLI's split; the plain name is allowed too.
    if task.name == "mnli" and (jsonl / "validation_matched.jsonl").is_file():
        validation = jsonl / "validation_matched.jsonl"
    if train.is_file() and validation.is_file():
        return Splits(_read_jsonl(task, train), _read_jsonl(task, validation))
    if (tsv / "train.tsv").is_file() and (tsv / official.dev).is_file():
        return Splits(_read_tsv(task, tsv / "train.tsv"), _read_tsv(task, tsv / official.dev))
    raise _explain_missing(task, folder, f"{train} with {validation.name}, and {tsv / 'train.tsv'} with {official.dev}")


def explain_task_folder(setting: str, folder: str) -> str:
    """Why `folder` is not the one to give, if it bears the name of a task; else empty. `setting` is what was given."""
    place = Path(folder).expanduser()
    target = place.resolve()
    if all(target.name not in (task, official.folder) for task, official in OFFICIAL.items()):
        return ""
    above = target.parent if place.is_symlink() else os.path.normpath(os.path.join(folder, ".."))
    return f"{setting}={folder} is the folder of one task: give the one above it, {setting}={above}"


def _explain_missing(task: Task, folder: str, tried: str) -> UserError:
    """The error for a folder without the task: what it holds instead, and what needs no files of GLUE."""
    root = Path(folder).expanduser()
    otherwise = "use the hub with data.dir=null, or task=snippets data.dir=null, which needs no hub"
    if not root.is_dir():
        return UserError(f"data.dir={folder} is no folder (tried {tried}): correct the path, {otherwise}")
    if reason := explain_task_folder("data.dir", folder):
        return UserError(reason)
    held = [
        name
        for name, one in OFFICIAL.items()
        if name != task.name
        and ((root / name / "train.jsonl").is_file() or (root / one.folder / "train.tsv").is_file())
    ]
    holds = f"only {', '.join(held)}" if held else "nor any other task of GLUE"
    return UserError(
        f"data.dir={folder} has no complete {task.name}, {holds}: tried {tried}; put the files there, {otherwise}"
    )


def _read_jsonl(task: Task, path: Path) -> datasets.Dataset:
    rows = Rows(task, path)
    for number, line in lines(path):
        if not line.strip():
            continue
        row = _parse_json(rows, number, line)
        missing = [name for name in rows.columns if name not in row]
        if missing:
            raise rows.error(number, f"column {', '.join(missing)} is missing: give {', '.join(rows.columns)}")
        rows.add(number, [row[name] for name in task.columns], row["label"])
    return rows.finish()


def _parse_json(rows: Rows, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also raised for numbers of thousands of digits
        reason = getattr(error, "msg", str(error))
        raise rows.error(number, f"not valid JSON ({reason}): give one object per line") from None
    if not isinstance(row, dict):
        raise rows.error(number, f"holds a JSON {type(row).__name__}: give one object per line")
    return row


def _read_tsv(task: Task, path: Path) -> datasets.Dataset:
    rows, official, found = Rows(task, path), OFFICIAL[task.name], lines(path)
    if not set(task.columns) <= set(official.texts):
        allowed = f"{path} is read by the names on the hub"
        raise fail("task.columns", list(task.columns), allowed, f"choose from {', '.join(official.texts)}")
    wanted = (*(official.texts[name] for name in task.columns), official.label)
    header = official.header or tuple(next(found, (1, ""))[1].split("\t"))
    missing = [name for name in wanted if name not in header]
    if missing:
        raise rows.error(1, f"column {', '.join(missing)} is missing: task={task.name} needs {', '.join(wanted)}")
    *texts, label = map(header.index, wanted)
    for number, line in found:
        if not line:  # such as at the end of a file that an editor saved; it holds no row
            continue
        fields = line.split("\t")  # the files have no quoting: a quote is part of the text
        if _check_fields(rows, number, fields, header):
            rows.add(number, [fields[index] for index in texts], _parse_label(task, fields[label]))
    return rows.finish()


def _check_fields(rows: Rows, number: int, fields: list[str], header: tuple[str, ...]) -> bool:
    """Whether the line has exactly the fields of the header.

    A short line of a flawed file is counted; any other raises `UserError`.
    """
    if len(fields) == len(header):
        return True
    # A stray tab cuts a text and shifts what follows. Where the label comes first, no later check would notice.
    if len(fields) < len(header) and rows.task.name in FLAWED:
        rows.skipped.append(number)
        return False
    raise rows.error(
        number,
        f"{len(fields)} tab separated fields: give {len(header)} ({', '.join(header)}); replace a tab inside a text by "
        "a space, or delete the line",
    )


def _parse_label(task: Task, text: str) -> Any:
    """Convert a label to its id or number; a name stays text, and `Rows.add` refuses what is none of them."""
    if text in task.labels:  # a name may be a number
        return text
    try:
        return float(text) if task.is_regression else int(text)
    except ValueError:
        return text


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without line end) of a UTF-8 file.

    Raises:
        UserError: with the number of a line that is not UTF-8, or too long.
    """
    with path.open("rb") as file:
        # Only "\n" ends a line: the texts contain other characters that Python treats as line ends, such as U+2028.
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise UserError(f"{path} line {number}: longer than {MAX_LINE} bytes: write one row per line")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} line {number}: not UTF-8 ({error.reason}): convert the file to UTF-8"
                ) from None
