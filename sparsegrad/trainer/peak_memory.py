"""Peak memory of a phase: what CUDA allocated, or on a CPU the resident set of the process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

MIB = 2**20
_CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the high-water mark (Linux)
_PEAKS = {"allocated_mib", "reserved_mib", "resident_mib"}
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The peak over all phases between `start` and `stop`, in MiB.

    On CUDA: `max_memory_allocated` and `max_memory_reserved`. On a CPU: the peak resident set, reported together with
    `baseline`, the resident set when the object was created. It is exact if the kernel can reset its high-water mark
    (Linux); otherwise it is the largest value that `start`, `sample` and `stop` saw. A phase counts when it has ended:
    before that there is no peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # only here: it takes a third of a second, and frees little later
        _return_freed_memory()
        self.baseline = _read_resident()
        self.peak: dict[str, float] = {}
        self._exact, self._begun = False, 0.0
        self._earlier: dict[str, Any] | None = None  # report of an earlier process

    def start(self) -> None:
        """Begin a phase: earlier peaks are forgotten."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _return_freed_memory()
            self._exact = _reset_high_water_mark()
            self._begun = _read_resident()  # counts at the end of the phase, if it has one

    def sample(self) -> None:
        """Include the memory in use now."""
        self._raise("resident_mib", _read_resident())

    def stop(self) -> None:
        """End a phase: include its peak."""
        if self.device.type == "cuda":
            self._raise("allocated_mib", torch.cuda.max_memory_allocated(self.device) / MIB)
            self._raise("reserved_mib", torch.cuda.max_memory_reserved(self.device) / MIB)
        elif self._exact:
            self._raise("resident_mib", _read_high_water_mark())
        else:
            self._raise("resident_mib", self._begun)
            self.sample()

    def restore(self, report: Mapping[str, Any]) -> None:
        """Include the peak that `report` returned in an earlier process of the same run."""
        texts = ("device", "method")
        self._earlier = {name: str(value) if name in texts else float(value) for name, value in report.items()}

    def report(self) -> dict[str, Any]:
        """Return the peak for the record, which may be that of an earlier process; without a phase there is none."""
        own = self._describe()
        return own if self._earlier is None else _choose_larger(own, self._earlier)

    def _describe(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {"device": "cuda", **_round_values(self.peak)}
        method = "VmHWM" if self._exact else "samples"
        return {"device": "cpu", "baseline_mib": round(self.baseline, 1), **_round_values(self.peak), "method": method}

    def _raise(self, name: str, value: float) -> None:
        self.peak[name] = max(self.peak.get(name, 0.0), value)


def _choose_larger(own: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The larger peak of two processes; on a CPU the larger one above its own baseline, with that baseline."""
    if own["device"] != earlier.get("device"):  # not comparable
        return own if own.keys() & _PEAKS else earlier
    if own["device"] == "cuda":
        names = (own | earlier).keys() & _PEAKS
        return own | {name: max(one.get(name, 0.0) for one in (own, earlier)) for name in sorted(names)}
    return max(own, earlier, key=lambda one: one.get("resident_mib", 0.0) - one.get("baseline_mib", 0.0))


def _round_values(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


def _read_resident() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


def _return_freed_memory() -> None:
    """Return memory freed by earlier phases to the system (glibc only), so that the next phase does not include it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    """Reset the kernel's high-water mark to the current resident set; False if the kernel cannot."""
    try:
        _CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return _STATUS.is_file()


def _read_high_water_mark() -> float:
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / 1024  # KiB to MiB
