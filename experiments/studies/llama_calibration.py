"""Measure the cost of calibration at the MLP shape of LLaMA-2-7B on a CPU: time and peak memory.

    python -m experiments.studies.llama_calibration

The command adds a few random gradients (11008, 4096) to the Gram matrices of one layer kind and decomposes both, with
the project's own code. It needs 2.3 GB of memory; the paper reports 668 s and 5.2 GB on a GPU. The result is a JSON in
results/bench.
`cpu_seconds` counts all threads; on a busy machine it is more meaningful than `seconds`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.calibration.grams import Grams
from sparsegrad.errors import UserError, check_integer
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment, now
from sparsegrad.trainer.peak_memory import PeakMemory

COLUMNS = 256  # number of columns of a basis that the check of orthogonality compares with all others


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 and one line after bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.llama_calibration", description=__doc__.split(":", 1)[0]
    )
    for name, default in (("out-features", 11008), ("in-features", 4096), ("gradients", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        shape = [check_integer(name, getattr(options, name), at_least=1) for name in ("out_features", "in_features")]
        count = check_integer("gradients", options.gradients, at_least=1)
        print(write(options.results_dir, measure(shape[0], shape[1], count), f"gram-{shape[0]}x{shape[1]}-{count}"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(out_features: int, in_features: int, count: int) -> dict[str, Any]:
    """Seconds of summing `count` gradients (out, in) and of the decomposition, separately, and peak memory."""
    grams = Grams()
    before = time.process_time()
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    spent = _add_gradients(grams, out_features, in_features, count)
    start = time.perf_counter()
    basis = grams.basis()
    decomposition = time.perf_counter() - start
    memory.stop()
    report = memory.report()
    return {
        "status": "complete",
        "seconds": round(spent + decomposition, 2),
        "sums_seconds": round(spent, 2),
        "eigenvectors_seconds": round(decomposition, 2),
        "cpu_seconds": round(time.process_time() - before, 2),
        "gradients": count,
        "threads": torch.get_num_threads(),
        "memory": report,
        "peak_mib": round(report["resident_mib"] - report["baseline_mib"], 1),
        "orthogonality": orthogonality(basis),
        "time": now(),
    }


def _add_gradients(grams: Grams, out_features: int, in_features: int, count: int) -> float:
    """Add `count` random gradients (out, in), and return the seconds that this takes without drawing them.

    No gradient is left afterwards: it would count towards the peak of the decomposition.
    """
    generator, spent = torch.Generator().manual_seed(0), 0.0
    for _ in range(count):
        G = torch.randn(out_features, in_features, generator=generator)
        start = time.perf_counter()
        grams.add(G)
        spent += time.perf_counter() - start
    return spent


def orthogonality(basis: Basis) -> float:
    """The largest entry of |Q^T Q - I| over evenly spaced columns; 0 for a perfectly orthogonal basis."""
    return max(_max_deviation(side) for side in (basis.in_basis, basis.out_basis) if side is not None)


def _max_deviation(Q: Tensor) -> float:
    chosen = torch.linspace(0, len(Q) - 1, min(COLUMNS, len(Q))).long()
    products = Q.T @ Q[:, chosen]
    products[chosen, torch.arange(len(chosen))] -= 1
    return float(products.abs().max())


def write(results: Path, found: dict[str, Any], key: str) -> Path:
    """Write a benchmark document that contains only this decomposition; returns its path."""
    facts = describe_environment(torch.device("cpu"))
    path = results / "bench" / "llama-calibration.json"
    document = {
        "schema": 1, "name": path.stem, "settings": {}, "cells": [], "calibrations": {}, "decompositions": {key: found},
        "hardware": facts["hardware"], "versions": facts["versions"], "git": facts["git"], "finished": now(),
    }  # fmt: skip
    write_json(path, document)
    return path


if __name__ == "__main__":
    sys.exit(main())
