"""results/report/index.html: a self-contained page with every table and figure, and links to the records."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.report.answers_page import has_answers
from experiments.report.collect import PRUNED, skipped_summary
from experiments.report.details import anchor, cell_details, environment_line
from experiments.report.render import write_text
from experiments.report.tables import hyperparams, speed
from experiments.report.tables.base import MISSING, OURS, Context, Table, is_measured

TEMPLATES = Path(__file__).parent / "templates"
LONG = 48  # characters; longer cells wrap
_DERIVED = ("table5", "table5_mini_overview", "mini_verdict", "table3_measured")  # made from cells of other tables
_CELLS_OF = {"table5_mini_overview": "table5_mini"}  # table -> table with the details of the same cells
THEMES = {
    "light": {"ink": "#1c1e21", "soft": "#5d646e", "box": "#f3f5f8", "new": "#dfeaf8", "grad": "#b3401f"},
    "dark": {"ink": "#e6e8eb", "soft": "#a2a9b3", "box": "#20252b", "new": "#1f3550", "grad": "#f0946f"},
}


def write_figure1(folder: Path) -> list[Path]:
    """Write our drawing of the signal flow as two SVGs, for light and dark backgrounds."""
    paths = []
    for theme, colours in THEMES.items():
        paths.append(folder / f"figure1-{theme}.svg")
        write_text(paths[-1], _template("figure1.svg.j2").render(colours) + "\n")
    return paths


def write_page(context: Context, tables: Sequence[Table], figures: Mapping[str, Path]) -> Path:
    """Render and write the page; `figures` maps titles to PNGs. Returns its path."""
    path = context.results / "report" / "index.html"
    images = [
        {"title": title, "name": image.stem, "image": base64.b64encode(image.read_bytes()).decode()}
        for title, image in figures.items()
    ]
    inline = _template("figure1.svg.j2").render({name: f"var(--{name})" for name in THEMES["light"]})
    # Images are embedded, so that the page works as a single file.
    facts = {"tables": [_describe_table(context, table, tables) for table in tables], "problems": problems(context)}
    facts |= {"figures": images, "figure1": Markup(inline), "failed": _count_failed(context), "counts": _counts(tables)}
    facts["answers"] = has_answers(context.results)
    write_text(path, _template("page.html.j2").render(facts | _environment(context)) + "\n")
    return path


def problems(context: Context) -> list[str]:
    """One line for each record, benchmark or summary that was not used, with the reason."""
    store = context.store
    lines = [line for line in (skipped_summary(store),) if line]
    others = [*speed.unread(context.results), *hyperparams.unread(context.results)]
    return [*lines, *store.skipped, *store.disagreements(), *others]


def _describe_table(context: Context, table: Table, tables: Sequence[Table]) -> dict[str, Any]:
    """A table in the form that the template expects."""
    measured, cells = table.coverage
    source = next((one for one in tables if one.name == _CELLS_OF.get(table.name)), table)
    known = {label: anchor(source.name, label) for label in source.records}
    records = [{str(name): str(cell) for name, cell in row.items()} for row in table.frame.to_dict("records")]
    return {
        "name": table.name,
        "title": table.title,
        "notes": table.notes,
        "columns": list(table.frame.columns),
        "rows": [[_cell(table, row, name, known) for name in table.frame.columns] for row in records],
        "details": cell_details(context, table),
        "measured": measured,
        "cells": cells,
        "share": round(100 * measured / cells) if cells else 0,
        "is_bare": table.is_bare,
        "command": _command(table.name),
    }


def _cell(table: Table, row: Mapping[str, str], name: str, known: Mapping[str, str]) -> dict[str, str]:
    """One cell: text, CSS class, and the anchor of its details, if it has records."""
    label = table.label_of(row) if name.startswith(OURS) else f"{row.get('method')} {name} {row.get('protocol')}"
    text = row[name]
    return {"text": text, "css": _css(text), "href": known.get(label, "") if text != MISSING else ""}


def _command(name: str) -> str:
    """The command that makes the runs of a table."""
    known = {
        "table5_mini_overview": "table5 SCALE=mini DATA=glue",
        "table5_mini": "table5 SCALE=mini DATA=glue",
        "mini_verdict": "table5 SCALE=mini DATA=glue",
        "table11_mini": "ablation SCALE=mini DATA=glue",
        "table13_mini": "table13 SCALE=mini DATA=glue",
        "basis_study": "basis SCALE=mini DATA=glue",
        "table3_measured": "table3",
    }
    target = known.get(name) or (name if re.fullmatch(r"table\d+|section8", name) else "")
    return f"make reproduce-{target}" if target else "make report"


def _counts(tables: Sequence[Table]) -> list[tuple[str, int, int]]:
    """(description, measured cells, all cells) for the paper's models and for others, without derived tables."""
    counted = {"cells of the paper's models": (0, 0), "cells of small or cut models": (0, 0)}
    for table in (one for one in tables if one.name not in _DERIVED):
        for cells, is_small in table.cells:
            name = list(counted)[is_small]
            counted[name] = (counted[name][0] + is_measured(cells), counted[name][1] + 1)
    return [(name, *numbers) for name, numbers in counted.items()]


def _count_failed(context: Context) -> int:
    """Number of failed runs; trials that their sweep pruned do not count."""
    failed = [record for record in context.store.records.values() if record["status"] == "failed"]
    return sum(not str(record.get("reason", "")).startswith(PRUNED) for record in failed)


def _template(name: str) -> Any:
    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=name.endswith("html.j2"), undefined=StrictUndefined).get_template(name)


def _css(text: str) -> str:
    """The CSS class of a cell."""
    if text.startswith("failed"):
        return "bad long"
    if text == MISSING:
        return "missing"
    return "long" if len(text) > LONG else ""


def _environment(context: Context) -> dict[str, Any]:
    found = [record.get("environment", {}) for _, record in sorted(context.store.records.items())]
    dates = sorted(one["finished"][:10] for one in found if one.get("finished"))
    lines = Counter(environment_line(one) for one in found if one)
    ends = {"first": dates[0] if dates else "", "last": dates[-1] if dates else ""}
    return {"record_count": len(found), "environments": sorted(lines.items()), **ends}
