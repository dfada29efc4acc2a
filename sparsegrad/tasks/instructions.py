"""Instructions with answers in Alpaca's format: conversations of one question and one answer, without a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad.assets.download import asset_path
from sparsegrad.errors import UserError
from sparsegrad.tasks.base import DataConfig, Splits
from sparsegrad.tasks.dialogue import Turn
from sparsegrad.tasks.glue_files import lines
from sparsegrad.tasks.language import LanguageTask, in_tenth, make_conversations
from sparsegrad.tasks.trees import check_unicode

ASSET = "alpaca"
MAX_LIST = 2**28  # bytes of a .json file, which is parsed as a whole; all 52,000 rows of Alpaca have 23 million
Row = tuple[str, list[Turn]]


@dataclass(frozen=True, kw_only=True)
class Instructions(LanguageTask):
    """Rows with `instruction`, `input` (may be empty or missing) and `output`.

    `data.dir` is a file or a folder of files: *.json with a list of rows, or *.jsonl with one row per line; None: the
    asset. The source has no split: a fixed tenth of the prompts is the validation split, so that no prompt is in both.
    """

    def _read(self, data: DataConfig) -> Splits:
        source = asset_path(ASSET) if data.dir is None else Path(data.dir).expanduser()
        parts: dict[str, list[Row]] = {"train": [], "validation": []}
        for file in _find_files(source):
            for where, row in _read_rows(file):
                prompt, answer = _read_texts(row, where)
                part = "validation" if in_tenth(prompt, "validation") else "train"
                parts[part].append((prompt, [Turn("user", prompt), Turn("assistant", answer)]))
        counts = {f"{part}_conversations": len(rows) for part, rows in parts.items()}
        return Splits(make_conversations(parts["train"]), make_conversations(parts["validation"]), counts)


def _find_files(source: Path) -> list[Path]:
    found = [source] if source.is_file() else sorted([*source.glob("*.json"), *source.glob("*.jsonl")])
    if not found:
        raise UserError(
            f"data.dir={source}: no such file, and no folder with *.json or *.jsonl files: give one, or null for the "
            "asset"
        )
    return found


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (position for error messages, row) of every row."""
    if path.suffix == ".jsonl":
        for number, line in lines(path):
            if line.strip():
                yield f"{path} line {number}", _parse_json(line, f"{path} line {number}")
        return
    rows = _parse_json(_read_whole(path), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path} is no list: give [{{instruction, input, output}}, ...], or a .jsonl file of rows")
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _read_whole(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_LIST:
        raise UserError(f"{path} has {size} bytes, of at most {MAX_LIST}: write a .jsonl file with one row per line")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8 ({error.reason}): convert the file to UTF-8") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also raised for numbers of thousands of digits
        raise UserError(f"{where} is not valid JSON ({error}): correct or remove it") from None


def _read_texts(row: Any, where: str) -> tuple[str, str]:
    """Return the question, which is the instruction followed by its input, and the answer."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: give one JSON object with instruction, input and output")
    found = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in found.items():
        if not isinstance(text, str) or (name != "input" and not text.strip()):
            raise UserError(f"{where} has no {name}: give a text, or remove the row")
        check_unicode(text, f"{where}: {name}")
    return "\n\n".join(text for text in (found["instruction"], found["input"]) if text), found["output"]
