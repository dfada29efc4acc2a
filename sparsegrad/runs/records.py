"""The record: the JSON that one run leaves. Written atomically, read back as a table."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError

from sparsegrad.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
MAX_JSON = 64 * 2**20  # bytes; a record has some 10,000
_PACKAGES = ("sparsegrad", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "hydra-core", "numpy")
# What a full, read-only or forbidden place answers, and how safetensors and torch.save say so.
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_WRITING_MARKS = ("Error while serializing: I/O error", "inline_container", "PytorchStreamWriter", "iostream error")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `path` is either as before or whole.

    Raises:
        UserError: when the folder cannot be written or the disk is full; nothing is left behind.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` so that `path` is either as before or whole; raises as `write_json`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        if scratch.parent.is_dir():
            scratch.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> UserError:
    """The error for a place that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"cannot write {path}: {reason}; free space there or choose another folder")


def is_of_writing(error: Exception, folders: Iterable[Path | str]) -> bool:
    """Whether `error` means that a file in one of `folders` could not be written, as on a full disk."""
    if isinstance(error, OSError):
        inside = error.filename is None or any(
            Path(error.filename).absolute().is_relative_to(Path(folder).absolute()) for folder in folders
        )
        return error.errno in _WRITING and inside
    return isinstance(error, SafetensorError | RuntimeError) and any(mark in str(error) for mark in _WRITING_MARKS)


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless a file can be made in `folder`, which is created if need be."""
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x" * 4096)
        probe.unlink()
    except OSError as error:
        raise unwritable(folder, error) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours.

    Raises:
        ValueError: when it is missing, damaged, nested too deep, or larger than any of ours.
    """
    try:
        return load_json(path)
    except OSError as error:
        raise ValueError(str(error)) from None


def load_json(path: Path) -> Any:
    """As `read_json`, but a file that is missing or cannot be read, whatever it holds, stays an `OSError`."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{size} bytes are too many")
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(str(error)) from None


def read_record(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        UserError: when it is damaged, of another schema, or without what tables need of it.
    """
    try:
        record = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not a readable record ({error}): delete it and run again") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path} has record schema {found}, this version reads {SCHEMA}: delete it and run again")
    if wrong := _wrong_field(record):
        raise UserError(f"{path} is not a readable record ({wrong}): delete it and run again")
    return record


def _wrong_field(record: Mapping[str, Any]) -> str | None:
    """The first field of `summary` that is not what it must be; None if all are."""
    try:
        row = summary(record)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__} {error}"
    # A score may be missing, that of a constant prediction is not defined; what it would be has a name.
    always = (*_ALWAYS, "metric") if row["status"] == "complete" and "result" in record else _ALWAYS
    for name, value in row.items():
        optional = name not in always
        if not (isinstance(value, _KINDS[name]) or (optional and value is None)):
            return f"{name} is a {type(value).__name__}"
    counts = (row["per_weight"] or {}).values()
    return None if all(isinstance(count, int) for count in counts) else "per_weight holds other than counts"


def find_complete(path: Path) -> dict[str, Any] | None:
    """The record at `path` if it is of a run that ended well, else None."""
    if not path.exists():
        return None
    record = read_record(path)
    return record if record["status"] == "complete" else None


def load_records(folder: Path | str, on_bad: Callable[[UserError], None] | None = None) -> pd.DataFrame:
    """All records below `folder`, one row each, sorted by path: the fields that tables need, and `path`.

    Raises:
        UserError: for a damaged record, unless `on_bad` takes it.
    """
    import pandas as pd  # here: the benchmark writes its results on machines without it

    rows = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            rows.append({"path": str(path), **summary(read_record(path))})
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return pd.DataFrame(rows)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that tables show, flat."""
    config, memory = record["config"], record.get("memory", {})
    return {
        "status": record["status"],
        "model": config["model"]["name"],
        "method": config["method"]["name"],
        "task": config["task"]["name"],
        "protocol": config["protocol"]["name"],
        "seed": config["seed"],
        "lr": config["train"]["lr"],
        "batch_size": config["train"]["batch_size"],
        "trainable": record.get("trainable", {}).get("total"),
        "per_weight": record.get("trainable", {}).get("per_weight"),
        "metric": record.get("result", {}).get("metric"),
        "value": record.get("result", {}).get("value"),
        "steps_per_second": record.get("speed", {}).get("steps_per_second"),
        "peak_mib": memory.get("allocated_mib", memory.get("resident_mib")),
        "baseline_mib": memory.get("baseline_mib"),
        "engine": config["method"].get("engine"),
        "device": memory.get("device"),
        "finished": record.get("environment", {}).get("finished"),
    }


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("status", "model", "method", "task", "protocol", "metric", "engine", "device", "finished"), str),
    **dict.fromkeys(("seed", "batch_size", "trainable"), int),
    **dict.fromkeys(("lr", "value", "steps_per_second", "peak_mib", "baseline_mib"), _NUMBER),
    "per_weight": dict,
}
_ALWAYS = ("status", "model", "method", "task", "protocol", "seed", "lr", "batch_size")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git state, hardware and the time now: what a reader needs to judge or repeat a run."""
    return {
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "git": _git(),
        "hardware": hardware(device),
        "started": now(),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads, and the GPU if one is used."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this file lies in; empty outside one."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":(exclude)results"],
            cwd=root.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
