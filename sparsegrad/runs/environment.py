"""Versions, git state and hardware: what a reader needs to judge or repeat a run."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from sparsegrad.precision import has_bfloat16_products

_PACKAGES = (
    "sparsegrad-peft", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "hydra-core", "numpy",
    "huggingface_hub", "tokenizers",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]  # of a checkout
CODE = ("sparsegrad", "experiments", "conf", "scripts", "run.py", "pyproject.toml")  # what decides a result


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, git state, hardware and the current time, for the record."""
    return {
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "git": _git(),
        "hardware": hardware(device),
        "started": now(),
    }


def finish_environment(
    environment: Mapping[str, Any], seconds: float | None, earlier: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Add the current time, the seconds of the run, and the `earlier` processes that it was continued from, if any."""
    continued = {"continued_from": list(earlier)} if earlier else {}
    return {**environment, "finished": now(), "seconds": seconds, **continued}


def list_processes(environment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The processes of a run, from a record's `environment`: those that it was continued from, and the last one."""
    return [*environment.get("continued_from", ()), environment]


def has_changed_code(environment: Mapping[str, Any]) -> bool:
    """Whether any process of a run, also one that it was continued from, had code that differs from its commit."""
    return any((one.get("git") or {}).get("dirty") for one in list_processes(environment))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads; the GPU if one is used, otherwise whether the processor multiplies bfloat16."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cpu":
        facts["bfloat16"] = has_bfloat16_products(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        facts |= {"gpu": name_device(device), "gpu_memory_gib": round(memory / 2**30, 1)}
    return facts


def name_device(device: torch.device) -> str:
    """The marketing name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def read_device_name(facts: Mapping[str, Any]) -> str:
    """The GPU that `hardware` has recorded, its CPU if none was used; empty without both."""
    return str(facts.get("gpu" if facts.get("device") == "cuda" else "cpu") or "")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git() -> dict[str, Any]:
    """Commit of the checkout that this package runs from, and whether its code has changes; empty elsewhere."""
    try:
        if Path(_ask_git("rev-parse", "--show-toplevel")) != ROOT:
            return {}  # installed in a folder of another repository, whose commit says nothing about this code
        return {"commit": _ask_git("rev-parse", "HEAD"), "dirty": bool(_ask_git("status", "--porcelain", "--", *CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _ask_git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
