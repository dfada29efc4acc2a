"""Findings in sentences; every number in them is computed from records, logs or printed cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import pandas as pd

from experiments.published import contradictions
from experiments.report import figures
from experiments.report.tables import ablation, basis, calibration, correspondence, speed
from experiments.report.tables.accuracy import MODELS
from experiments.report.tables.base import Context, Table

Finding = tuple[str, str, str]
"""(question, answer, table or figure that the answer is based on)."""


def table(context: Context) -> Table:
    """All findings that the available data allows."""
    rows = [
        *_basis(context),
        *_stripes(context),
        *_speed(context),
        *_paper(context),
    ]
    frame = pd.DataFrame(rows, columns=["question", "answer", "based on"])
    notes = [
        "All numbers are computed from measurements, the authors' logs or printed cells. Questions without data are "
        "omitted. Comparisons of methods are in the ledger.",
    ]
    return Table("findings", "Findings", frame, notes)


def _basis(context: Context) -> Iterator[Finding]:
    found = basis.read(context.results)
    if found is not None:
        energy = {
            name: {kind: mean(basis.kept_energy(found, name, kind).values()) for kind in figures.KINDS}
            for name in ("none", "both", "authors")
        }
        said = "; ".join(
            f"{kind}: {100 * energy['both'][kind]:.0f} % with HOSVD, {100 * energy['none'][kind]:.0f} % unrotated, "
            f"{100 * energy['authors'][kind]:.0f} % in the authors' basis"
            for kind in figures.KINDS
        )
        yield (
            "What share of the gradient energy is in the largest 1 % of entries, on average over steps "
            f"({_measured_on(found)})?",
            said,
            "basis",
        )


def _stripes(context: Context) -> Iterator[Finding]:
    found = figures.read_data(context, "figure3")
    if found is None:
        return
    said = []
    for pad, label in figures.PADS.items():
        rows = [row for row in found["shares"] if row["pad"] == pad]
        nonzero = {
            kind: 100 * mean(share for row in rows for share in row["nonzero"][kind][:-1]) for kind in figures.KINDS
        }
        shares = ", ".join(f"{share:.1f} % ({kind})" for kind, share in nonzero.items())
        real = 100 * mean(row["real_tokens"] for row in rows)
        said.append(
            f"{label}: {shares} of the entries of dL/dY are non-zero, {real:.1f} % of the tokens are not padding"
        )
    yield (
        f"What causes the stripes of dL/dY (all blocks but the last; {_measured_on(found)})?",
        "; ".join(said),
        "figure3",
    )


def _measured_on(found: Mapping[str, Any]) -> str:
    """Model and task that a figure's data was measured on."""
    return f"{found['model']} on {found['task']}"


def _speed(context: Context) -> Iterator[Finding]:
    found = [row for row in speed.measured(context.results) if speed.is_main(row) and row["speed"] is not None]
    for machine, label in dict.fromkeys((row["machine"], row["label"]) for row in found):
        of = {row["arm"]: row for row in found if (row["machine"], row["label"]) == (machine, label)}
        pairs = [("exact", "layer_regular"), ("exact", "full"), ("fast", "lora_peft")]
        said = [
            f"{arm}: {ratio:.2f} times the steps/s of {other}"
            + " (by different commits)" * bool(of[arm]["speed_mark"][other])
            for arm, other in pairs
            if arm in of and (ratio := of[arm]["speed_over"].get(other)) is not None
        ]
        if said:
            few = f"; {of['exact']['n']} process per engine" if "exact" in of and of["exact"]["n"] == 1 else ""
            yield (
                f"How fast are the engines on {machine} ({label or 'whole model'}{few})?",
                "; ".join(said),
                "table3_measured",
            )


def _paper(context: Context) -> Iterator[Finding]:
    wrong = [one for one in correspondence.checks() if one.printed is not None and one.printed > correspondence.TINY]
    names = ", ".join(one.row for one in wrong)
    yield "Do the rows of Table 2 hold numerically?", f"corrected, all do; as printed, all but {names}", "table2"
    yield from _averages((*sorted(MODELS), *speed.PER_TASK))
    lines = [f"Table {number}: {line}" for number in ablation.MODELS for line in ablation.copied(number)]
    if lines:
        yield "Are the 100 % rows of the ablation separate runs?", " ".join(lines), "table11, table12"
    for one in calibration.PRINTED:
        numbers, printed = calibration.arithmetic(one), float(one.memory.split()[0])
        printed *= 1000 if one.memory.endswith("GB") else 1
        closest = min(numbers, key=lambda name: abs(numbers[name] - printed))
        said = f"the closest candidate is {closest}: {numbers[closest]:,.0f} MB"
        yield f"What do the {one.memory} of section 8 measure ({one.model})?", said, "section8"


def _averages(tables: Sequence[int]) -> Iterator[Finding]:
    said = [f"Table {number}, {line}" for number in tables for line in contradictions(number)]
    if said:
        places = ", ".join(f"table{number}" for number in tables)
        yield "Which printed averages contradict their cells?", "; ".join(said), places
