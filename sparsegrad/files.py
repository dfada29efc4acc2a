"""Atomic writes of small files, and reads of JSON with a limit on its size."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sparsegrad.errors import ResourceError, first_line

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 64 * 2**20  # bytes; a record has about 10,000
MAX_DIGITS = 300  # of an integer; a float cannot hold one of 310
MAX_LEVELS = 32  # of nesting; a record has six. Code that copies or merges what it read recurses several times a level.
# Error codes of a full, read-only or protected file system, and how safetensors and torch.save report them.
_PROTECTED = {errno.EROFS, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST}  # a file is in the place of a folder
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, *_PROTECTED, errno.ENOTDIR}
_WRITING_MARKS = (
    "Error while serializing: I/O error", "Error while serializing: IoError",  # the second of older versions
    "inline_container", "PytorchStreamWriter", "iostream error",
)  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, atomically: `path` has either its old content or all of the new.

    Raises:
        ResourceError: when the folder cannot be written or the disk is full; no partial file remains.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` atomically, in UTF-8; see `write_json`."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically; see `write_json`."""
    write_with(path, lambda scratch: scratch.write_bytes(content))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a scratch file beside `path`, and rename it once it is complete; see `write_json`."""
    # The process id keeps two processes that write the same file apart.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        flush(scratch)
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):  # on a read-only file system even the deletion of a missing file fails
            scratch.unlink()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the permissions of any new file; the package's own are the owner's alone."""
    from safetensors.torch import save_file  # imports torch, which a command that only reads records does not need

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    with suppress(OSError):  # some network file systems have no permissions to give
        path.chmod(mode)


def share_tensors(folder: Path, like: str) -> None:
    """Give the safetensors files that another package wrote to `folder` the permissions of its file `like`."""
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):
            path.chmod((folder / like).stat().st_mode)


def flush(path: Path) -> None:
    """Wait until a file is on the disk. If it is renamed before, a power failure may leave an empty file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def unwritable(path: Path, error: Exception, otherwise: str = "") -> ResourceError:
    """The error for a path that cannot be written, with the remedy for its cause and, after it, `otherwise`."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return ResourceError(
        f"cannot write {path}: {reason}; {_find_remedy(path, getattr(error, 'errno', None))}{otherwise}"
    )


def unreadable(path: Path | str | None, error: OSError, otherwise: str = "") -> ResourceError:
    """The error for a file that exists but cannot be read, as after a temporary failure of the disk."""
    reason = error.strerror or first_line(error)
    return ResourceError(
        f"cannot read {path} ({reason}): nothing was deleted; try again when it can be read{otherwise}"
    )


def _find_remedy(path: Path, number: int | None) -> str:
    if number in _IN_THE_WAY:
        blocking = next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None)
        return "choose another folder" if blocking is None else f"{blocking} is a file: choose another folder"
    if number == errno.EISDIR:
        return f"{path} is a folder: choose another name"
    if number in _PROTECTED:
        return "check the permissions or choose another folder"
    return "free space there or choose another folder"  # also for errors without a number, as safetensors raises them


def is_of_writing(error: Exception, folders: Iterable[Path | str]) -> bool:
    """Whether `error` means that a file in one of `folders` could not be written, as on a full disk."""
    if isinstance(error, OSError):
        inside = error.filename is None or any(
            Path(error.filename).absolute().is_relative_to(Path(folder).absolute()) for folder in folders
        )
        return error.errno in _WRITING and inside
    return isinstance(error, SafetensorError | RuntimeError) and any(mark in str(error) for mark in _WRITING_MARKS)


def check_writable(folder: Path) -> None:
    """Raise `ResourceError` unless a file can be created in `folder`, which is created if needed."""
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x" * 4096)  # a block: on a full disk an empty file can still be created
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        with suppress(OSError):  # on a read-only file system even the deletion of a missing file fails
            probe.unlink()


def read_json(path: Path) -> Any:
    """The content of a JSON file that this project wrote.

    Raises:
        ValueError: when it is missing, damaged, nested deeper than `MAX_LEVELS`, larger than
            `MAX_JSON`, or contains an integer of more than `MAX_DIGITS` digits.
    """
    try:
        return load_json(path)
    except OSError as error:
        raise ValueError(str(error)) from None


def load_json(path: Path) -> Any:
    """Like `read_json`, but raises `OSError` for a file that is missing or cannot be read."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{size} bytes are too many")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_parse_integer)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if _is_deep(content):
        raise ValueError(f"nested deeper than {MAX_LEVELS} levels")
    return content


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_LEVELS):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for part in parts for one in part]
    return any(isinstance(one, dict | list) for one in level)
