"""The machine: its name, its hardware, and the precisions it supports."""

from __future__ import annotations

import os
import re
from typing import Any

import psutil
import torch

from experiments.bench.settings import PRECISIONS
from sparsegrad.errors import fail
from sparsegrad.precision import has_bfloat16_products
from sparsegrad.runs.environment import hardware, name_device


def default_threads() -> int:
    """Physical cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions that the hardware supports; a CPU that would only emulate bf16 does not count."""
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)  # the first with TF32 and bf16
        return PRECISIONS if ampere else ("fp32",)
    return tuple(name for name in PRECISIONS if name == "fp32" or (name != "tf32" and has_bfloat16_products(device)))


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `UserError` for a precision that the device does not support."""
    allowed = precisions(device)
    if precision not in allowed:
        raise fail("precision", precision, f"{name_device(device)} has {', '.join(allowed)}", "choose one of these")


def slug(device: torch.device, threads: int) -> str:
    """A short name for files, such as cpu-2-amd-epyc or nvidia-h100."""
    name = name_device(device).lower()
    words = re.sub(r"\((r|tm)\)|@.*|\b\d+ ?gb\b|\b(hbm\d*e?|pcie|sxm\d*|nvl|cpu|processor)\b", " ", name)
    short = "-".join(re.findall(r"[a-z0-9]+", words)[:4]) or "unknown"
    return short if device.type == "cuda" else f"cpu-{threads}-{short}"


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware and supported precisions, for the results file."""
    return {**hardware(device), "precisions": list(precisions(device))}


def gpu_memory_gib(device: torch.device) -> float:
    """Memory of the GPU in GiB."""
    return float(torch.cuda.get_device_properties(device).total_memory / 2**30)
