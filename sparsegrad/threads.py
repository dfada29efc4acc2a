"""How many threads a run uses where its user has not said so (`OMP_NUM_THREADS`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, and the period of the clock
_MANY = 4  # cores from which one is left to everything else


def limit_threads(share: int = 1) -> None:
    """Let torch use the cores that this process may use, divided by `share` processes; the user's setting stays.

    The two threads of one core compute no faster than one. With more cores than four, one is left free: a product
    waits for its slowest thread, and the one that shares its core with another program is the slowest.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // share))


def usable_cores() -> int:
    """Physical cores that this process may use."""
    # Linux alone knows which processors a process may use, and which of them share a core.
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = len({_read_siblings(cpu) for cpu in allowed})
    cores = max(1, min(cores, _read_quota() or cores))
    return cores - 1 if cores > _MANY else cores


def _read_siblings(cpu: int) -> str:
    """Name the core of a processor by the processors that share it; where that is unknown, it has none beside it."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8").strip()
    except OSError:
        return str(cpu)


def _read_quota() -> int | None:
    """Whole processors that a container may use; None without a limit."""
    try:
        quota, period = _QUOTA.read_text(encoding="utf-8").split()[:2]
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
