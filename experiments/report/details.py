"""Details of one cell on the page: records, curves of loss and metric, environment, and the command that reruns it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from experiments.report.blocks import BLOCKS, block_command
from experiments.report.collect import EXPERIMENTS, commit_of, hours
from experiments.report.comparison.notes import PLANS
from experiments.report.tables.base import Context, Table

# Folder of the records -> target of `make reproduce-` that makes them.
COMMANDS = {**EXPERIMENTS, "table6": "table6", "table6_mini": "table6 SCALE=mini"}
WIDTH, HEIGHT, POINTS = 240, 72, 48  # size of a curve in SVG units, and its maximum number of points

Curve = list[tuple[float, float]]
"""(step, value) of one run."""


@dataclass(frozen=True)
class RunLine:
    """One record in one line."""

    path: str
    seed: int
    said: str


@dataclass(frozen=True)
class Detail:
    """The details of one cell."""

    anchor: str
    label: str
    runs: list[RunLine]
    curves: list[Markup]
    environments: list[str]
    command: str


def anchor(table: str, label: str) -> str:
    """The HTML id of a cell."""
    return f"{table}--{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"


def cell_details(context: Context, table: Table) -> list[Detail]:
    """Details of every cell of a table that has records."""
    return [_detail(context, table, label, paths) for label, paths in table.records.items()]


def _detail(context: Context, table: Table, label: str, paths: Sequence[Path]) -> Detail:
    records = [(path, context.store.records[path]) for path in paths]
    found = [record for _, record in records]
    return Detail(
        anchor=anchor(table.name, label),
        label=label,
        runs=[_run(path, record) for path, record in sorted(records, key=lambda pair: pair[1]["config"]["seed"])],
        curves=[_draw_curves(_losses(found), "training loss"), _draw_curves(*_metrics(found))],
        environments=sorted({environment_line(record.get("environment", {})) for record in found}),
        command=_command(records),
    )


def environment_line(environment: Mapping[str, Any]) -> str:
    """Hardware and package versions in one line."""
    hardware, versions = environment.get("hardware", {}), environment.get("versions", {})
    what = [str(hardware.get(name)) for name in ("gpu", "cpu", "system") if hardware.get(name)]
    what += [f"{hardware.get('cores')} cores", f"{hardware.get('threads')} threads"]
    what += ["no instructions for bfloat16"] if hardware.get("bfloat16") is False else []
    return ", ".join([*what, *(f"{name} {number}" for name, number in versions.items())])


def _run(path: Path, record: Mapping[str, Any]) -> RunLine:
    spent, commit = hours(record), commit_of(record)
    said = [_outcome(record)]
    said += [f"{60 * spent:.0f} min"] if spent is not None else []
    said += [f"commit {commit}"] if commit else []
    return RunLine(path.as_posix(), int(record["config"]["seed"]), ", ".join(said))


def _outcome(record: Mapping[str, Any]) -> str:
    if record["status"] != "complete":
        return f"failed: {record.get('reason', '')}"
    result = record["result"]
    said = f"{result.get('metric', 'score')} {float(result['value']):.4f}"
    best = result.get("best_on_validation")
    return said if best is None else f"{said} (heldout), {float(best['value']):.4f} (paper)"


def _losses(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    return [[(row["step"], row["loss"]) for row in _rows_with(record.get("losses", []), "loss")] for record in records]


def _metrics(records: Sequence[Mapping[str, Any]]) -> tuple[list[Curve], str]:
    name = str(records[0]["config"]["task"].get("main_metric", "loss"))
    rows = [_rows_with(record.get("evaluations", []), name) for record in records]
    return [[(row["step"], row[name]) for row in of] for of in rows], name.replace("_", " ")


def _rows_with(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get(name) is not None]


def _draw_curves(curves: Sequence[Curve], label: str) -> Markup:
    """An SVG with one line per run; empty if no run has a point."""
    points = [point for curve in curves for point in curve]
    if not points:
        return Markup("")
    last, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    lines = "".join(_line(curve, index, (last, low, high)) for index, curve in enumerate(curves) if curve)
    said = f"{label}: {low:.3g} to {high:.3g}, {last:g} steps"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none"'
    drawn = f'<svg {size} role="img" aria-label="{escape(said)}">{lines}</svg>'
    return Markup(f'<figure class="curve">{drawn}<figcaption>{escape(said)}</figcaption></figure>')


def _line(curve: Curve, index: int, bounds: tuple[float, float, float]) -> str:
    last, low, high = bounds
    every = -(-len(curve) // POINTS)  # rounded up; the last point is always kept
    kept = [*curve[:-1:every], curve[-1]]
    span, tall = max(last, 1e-9), max(high - low, 1e-9)  # a constant curve has no height
    points = [f"{WIDTH * x / span:.0f},{3 + (HEIGHT - 6) * (1 - (y - low) / tall):.1f}" for x, y in kept]
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle class="s{index % 3}" cx="{x}" cy="{y}" r="2"/>'
    return f'<polyline class="s{index % 3}" points="{" ".join(points)}"/>'


def _command(records: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """The command that makes these records again after they are deleted."""
    path, config = records[0][0], records[0][1]["config"]
    name, needs_data = COMMANDS.get(path.parts[0]), config["task"]["name"] not in ("snippets", "snippets_rating")
    if path.parts[0] in BLOCKS:
        return block_command(path.parts[0], [int(record["config"]["seed"]) for _, record in records])
    if path.parts[0] in PLANS:
        return f"{PLANS[path.parts[0]].command} METHODS={config['method']['name']}"
    if name is None:
        return f"sparsegrad records results/runs/{path.parts[0]}"
    seeds = ",".join(dict.fromkeys(str(record["config"]["seed"]) for _, record in records))
    chosen = [*_variant(path.parts[0], config["method"]), f"task={config['task']['name']}", f"seed={seeds}"]
    data = " DATA=<folder>" if needs_data and "SCALE=mini" in name else ""
    return f'make reproduce-{name}{data} ARGS="{" ".join(chosen)}"'


def _variant(folder: str, method: Mapping[str, Any]) -> Iterator[str]:
    """Overrides for the option of the method that the experiment of a folder varies."""
    if folder.startswith("table6"):
        return  # two experiments with different methods share this folder: the command makes all of them
    is_ablation = folder.startswith("ablation")
    yield f"method.keep={method['keep']}" if is_ablation else f"method={method['name']}"
