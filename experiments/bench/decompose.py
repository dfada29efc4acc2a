"""The HOSVD of calibration alone: Gram matrices against the stacked tensor (`sparsegrad.calibration.grams.hosvd`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsegrad.calibration.grams import hosvd
from sparsegrad.trainer.peak_memory import PeakMemory

FLOAT64 = 8  # bytes


def measure_decomposition(method: str, out_features: int, in_features: int, count: int, seed: int) -> dict[str, Any]:
    """Seconds and peak memory of the HOSVD of `count` random gradients (out, in) by `method`, on the CPU.

    Gradients are generated one by one, as back-propagation produces them; both methods' times include that.
    """
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = time.perf_counter()
    hosvd(_gradients(out_features, in_features, count, seed), method)
    seconds = time.perf_counter() - before
    memory.stop()
    report = memory.report()
    peak = round(report["resident_mib"] - report["baseline_mib"], 1)
    return {"seconds": round(seconds, 3), "memory": report, "peak_mib": peak}


def stacked_mib(out_features: int, in_features: int, count: int) -> float:
    """Size of the stacked tensor in float64, in MiB: a lower bound of what its SVD needs."""
    return out_features * in_features * count * FLOAT64 / 2**20


def _gradients(out_features: int, in_features: int, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(out_features, in_features, generator=generator)
