"""Peak memory of a phase: what CUDA allocated, or the resident set of the process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Any

import psutil
import torch

MIB = 2**20
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The peak over all phases between `start` and `stop`, in MiB.

    On CUDA: `max_memory_allocated` and `max_memory_reserved`. On a CPU: the peak resident set, above `baseline`, the
    resident set when the object was made; exact where the kernel keeps and resets a high-water mark (Linux),
    elsewhere the largest of the samples that `sample` took.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # once: what it frees later in the phase is little, and it takes a third of a second
        _return_freed_memory()
        self.baseline = _resident()
        self.peak: dict[str, float] = {}
        self._exact = False

    def start(self) -> None:
        """Forget what was before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _return_freed_memory()
            self._exact = _reset_high_water_mark()
            self.sample()

    def sample(self) -> None:
        """Note the memory in use now."""
        self._raise("resident_mib", _resident())

    def stop(self) -> None:
        """Take over the peak since `start`."""
        if self.device.type == "cuda":
            self._raise("allocated_mib", torch.cuda.max_memory_allocated(self.device) / MIB)
            self._raise("reserved_mib", torch.cuda.max_memory_reserved(self.device) / MIB)
        elif self._exact:
            self._raise("resident_mib", _high_water_mark())
        else:
            self.sample()

    def report(self) -> dict[str, Any]:
        """What was measured, for the record."""
        if self.device.type == "cuda":
            return {"device": "cuda", **_rounded(self.peak)}
        method = "VmHWM" if self._exact else "samples"
        return {"device": "cpu", "baseline_mib": round(self.baseline, 1), **_rounded(self.peak), "method": method}

    def _raise(self, name: str, value: float) -> None:
        self.peak[name] = max(self.peak.get(name, 0.0), value)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


def _resident() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


def _return_freed_memory() -> None:
    """Give what earlier phases freed back to the system (glibc only), so that it does not count for the next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    """Set the kernel's high-water mark to what is resident now; False where there is none."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.is_file()


def _high_water_mark() -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / 1024
