"""Append-only files of JSON lines: a line is written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsegrad.errors import BusyError, UserError
from sparsegrad.files import unwritable

Row = dict[str, Any]
_PATIENCE = 1.0  # seconds to wait for a process that is just ending


def read_lines(path: Path) -> list[Row]:
    """All rows of `path`, or none if there is no file. An incomplete last line, left by a killed writer, is ignored.

    Raises:
        UserError: when the file cannot be read, or another line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = _content(path).split(b"\n")
    rows = [_parse(line) for line in lines]
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), start=1):
        cut = number == len(lines)
        if row is None and line.strip() and not cut:
            raise UserError(f"{path}, line {number} is not a JSON object: repair or delete the line")
    return [row for row in rows if row is not None]


@contextmanager
def only_writer(path: Path, work: str = "answers") -> Iterator[None]:
    """Within: no other process does the same work for `path`. Both would compute, or pay for, the same rows.

    Args:
        path: the file of rows; its folder is created if needed.
        work: names the lock file, so that different works for one file can go on at once.

    Raises:
        BusyError: when another process is doing it.
        ResourceError: when the lock file cannot be written.
    """
    lock = FileLock(f"{path}.{work}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise BusyError(f"{path}: another process is already writing it: wait until it ends, or stop it") from None
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        yield
    finally:
        lock.release()


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row, on disk when this returns; first an incomplete last line is removed. Safe across processes.

    Raises:
        UserError: when the file cannot be written.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), path.open("ab+") as file:
            start = _repair_end(file)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())  # a verdict costs money: it must survive a crash of the machine
            except OSError:
                file.truncate(start)  # a full disk must not leave half a line
                raise
    except OSError as error:
        raise unwritable(path, error) from None


def _repair_end(file: Any) -> int:
    """Remove an incomplete last line, or end a complete one; returns the file's length afterwards."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        if _parse(content[whole:]) is None:
            file.truncate(whole)
        else:
            file.write(b"\n")
    return int(file.seek(0, os.SEEK_END))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _parse(line: bytes) -> Row | None:
    # No proper prefix of a JSON object is valid JSON, so an incomplete line never parses.
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
