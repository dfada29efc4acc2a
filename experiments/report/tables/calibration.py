"""Section 8 of the paper: cost of calibration as printed, what its megabytes may count, and our measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.report.bench_files import documents
from experiments.report.tables.base import MISSING, Context, Table


@dataclass(frozen=True)
class Printed:
    """One model in section 8.

    Attributes:
        model, seconds, memory: as printed.
        kinds: shapes (out, in) of the layer kinds.
        blocks: number of blocks with SparseGrad layers.
    """

    model: str
    seconds: str
    memory: str
    kinds: tuple[tuple[int, int], ...]
    blocks: int


PRINTED = (
    Printed("RoBERTa-base", "78 s", "276 MB", ((3072, 768), (768, 3072)), 12),
    Printed("LLaMA-2-7B", "668 s", "5.2 GB", ((11008, 4096), (4096, 11008)), 11),
)
STEPS = 30
FLOAT32 = 4  # bytes
MB = 1e6


def arithmetic(one: Printed) -> dict[str, float]:
    """Candidates for what the printed memory counts -> MB in float32; of one layer kind, except the bases."""
    out_features, in_features = one.kinds[0]
    gradient = out_features * in_features
    return {
        "gradients of 1 weight, 30 steps": STEPS * gradient * FLOAT32 / MB,
        "gradients of all blocks, 1 step": one.blocks * gradient * FLOAT32 / MB,
        "gradients of all blocks, 30 steps": STEPS * one.blocks * gradient * FLOAT32 / MB,
        "Gram matrices instead of gradients": (out_features**2 + in_features**2) * FLOAT32 / MB,
        "bases of both kinds": sum(m * m + n * n for m, n in one.kinds) * FLOAT32 / MB,
    }


def table(context: Context) -> Table:
    """Printed cost and the candidates, then our measurements."""
    rows = []
    for one in PRINTED:
        for what, megabytes in arithmetic(one).items():
            rows.append({"model": one.model, "what": what, "MB": f"{megabytes:,.0f}", "seconds": ""})
        rows.append({"model": one.model, "what": "published", "MB": one.memory, "seconds": one.seconds})
    rows += _measured(context)
    return Table("section8", "Section 8: cost of calibration", pd.DataFrame(rows), [*_notes(), *_missing(rows)])


def _notes() -> list[str]:
    lines = []
    for one in PRINTED:
        numbers = arithmetic(one)
        closest = min(numbers, key=lambda name: abs(numbers[name] - in_mb(one.memory)))
        binary = numbers[closest] * MB / 2**20
        lines.append(
            f"{one.model}: the closest to the printed {one.memory} is '{closest}': {numbers[closest]:,.0f} MB, "
            f"{binary:,.0f} MiB."
        )
    return [
        "Computed in float32 for one layer kind; LLaMA-2 with its 11 blocks 0, 3, ..., 30.",
        *lines,
        "So the printed memory is probably that of one weight, although no candidate matches it exactly. The stack of "
        "section 3.1 has all blocks and is larger by their number.",
    ]


def in_mb(text: str) -> float:
    """Megabytes of a printed size such as `5.2 GB`."""
    number, unit = text.split()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


def _measured(context: Context) -> list[dict[str, str]]:
    rows = []
    for name, document in documents(context.results):
        for group in ("decompositions", "calibrations"):
            for key, found in document.get(group, {}).items():
                if found.get("status") == "complete":
                    peak, seconds = (found.get(field) for field in ("peak_mib", "seconds"))
                    shown = "" if peak is None else f"{peak * 2**20 / MB:,.0f}"
                    label = f"measured: {group[:-1]} {key}{_format_length(found)}"
                    rows.append({"model": name, "what": label, "MB": shown, "seconds": f"{seconds:.1f} s"})
                    rows += _extrapolate(name, key, found)
    return rows


def _format_length(found: Mapping[str, Any]) -> str:
    """Steps and tokens of a calibration, as part of a label."""
    return f", {found['steps']} steps of {found['tokens']:.0f} tokens each" if "tokens" in found else ""


def _extrapolate(name: str, key: str, found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Seconds of a whole calibration of LLaMA-2, from a measurement that times sums and decomposition separately."""
    if "sums_seconds" not in found:
        return []
    one = PRINTED[-1]
    sums = found["sums_seconds"] / found["gradients"]
    seconds = len(one.kinds) * (STEPS * one.blocks * sums + found["eigenvectors_seconds"])
    parts = f"{sums:.1f} s per gradient, {found['eigenvectors_seconds']:.0f} s for both bases of a kind"
    label = f"computed from {key}: {parts}; 30 steps, 11 blocks, both kinds"
    return [{"model": name, "what": label, "MB": "", "seconds": f"{seconds:,.0f} s"}]


def _missing(rows: list[dict[str, str]]) -> list[str]:
    if any(row["what"].startswith("measured") for row in rows):
        return [
            "Decompositions are named method-OUTxIN-COUNT: COUNT random gradients, both bases of one layer kind. The "
            "time of the stacked method is linear in COUNT. MB are above the process's memory before. "
            "llama-calibration was measured on a CPU that also did other work; the published 668 s are on a GPU.",
            "Calibrations are named MODEL-BLOCKS: gradients of that many blocks and the bases of both kinds, with "
            "fewer steps than the paper's 30.",
        ]
    return [f"Measurements: {MISSING}; make them with `python -m experiments.bench --presets decomposition`."]
