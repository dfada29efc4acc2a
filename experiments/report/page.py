"""results/report/index.html: a self-contained page with every table and figure, and links to the records."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.report.answers_page import has_answers
from experiments.report.bench_files import unread
from experiments.report.blocks import BLOCKS, IN_SMALL, block_command
from experiments.report.collect import skipped_summary
from experiments.report.comparison import notes as comparison
from experiments.report.details import anchor, cell_details, environment_line
from experiments.report.tables import hyperparams
from experiments.report.tables.base import MISSING, OURS, Context, Table
from experiments.report.tables.main_tables import progress
from sparsegrad.files import write_text
from sparsegrad.runs.records import PRUNED

TEMPLATES = Path(__file__).parent / "templates"
LONG = 48  # characters; longer cells wrap
EVIDENCE = ("evidence_", "compare")  # prefixes of the names of tables
LEDGER, FINDINGS, BASED_ON = "claims", "findings", "based on"
_PART = r"(< |~)?[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?"
_UNIT = r"( ?%| MiB| MB| GB| GiB| s| h)?"
# 1.25, 0.82 ± 0.01 (3), 16 / 2.00e-05, -0.2 to 0.4, 4.3 B, < 1e-10, each with a unit or without
NUMBER = re.compile(rf"{_PART}( [MB])?( ± [\d.]+)?( (to|/) {_PART})?( \(\d+\))?{_UNIT}( / [\d.]+%)?")
WORDS = (MISSING, "none", "no log", "not run yet", "no figure", "-")  # what a column of numbers holds where it has none
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
    names = {table.name for table in tables}
    images = [_describe_figure(title, image, path.parent, names) for title, image in figures.items()]
    inline = _template("figure1.svg.j2").render({name: f"var(--{name})" for name in THEMES["light"]})
    # Images are embedded, so that the page works as a single file.
    described = [_describe_table(context, table, tables, {*figures_by_name(figures)}) for table in tables]
    facts = {**_sort_sections(described, images), "problems": problems(context), "figure1": Markup(inline)}
    facts |= {"failed": _count_failed(context), "progress": progress(context), "answers": has_answers(context.results)}
    write_text(path, _template("page.html.j2").render(facts | _environment(context)) + "\n")
    return path


def _describe_figure(title: str, image: Path, page: Path, tables: Collection[str]) -> dict[str, str]:
    """A figure in the form that the template expects; one with the name of a table has an id of its own."""
    return {
        "title": title,
        "name": f"{image.stem}-figure" if image.stem in tables else image.stem,
        "image": base64.b64encode(image.read_bytes()).decode(),
        "file": Path(os.path.relpath(image.with_suffix(".pdf"), page)).as_posix(),
    }


def figures_by_name(figures: Mapping[str, Path]) -> dict[str, str]:
    """File name without suffix -> title."""
    return {path.stem: title for title, path in figures.items()}


def _sort_sections(tables: Sequence[dict[str, Any]], images: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The parts of the page in their order; tables without anything of ours are folded away."""
    by_name = {table["name"]: table for table in tables}
    evidence = sorted((name for name in by_name if name.startswith(EVIDENCE)), key=_place_block)
    others = [table for name, table in by_name.items() if name not in (LEDGER, FINDINGS, *evidence)]
    return {
        "ledger": by_name.get(LEDGER),
        "evidence": [by_name[name] for name in evidence],
        "findings": by_name.get(FINDINGS),
        "paper": [table for table in others if not table["is_bare"]],
        "bare": [table for table in others if table["is_bare"]],
        "figures": images,
    }


def _place_block(table: str) -> int:
    """The place of a table's block among the blocks; comparisons are last."""
    return next((place for place, folder in enumerate(BLOCKS) if table.startswith(folder)), len(BLOCKS))


def problems(context: Context) -> list[str]:
    """One line for each record, benchmark or summary that was not used, with the reason."""
    store = context.store
    lines = [line for line in (skipped_summary(store),) if line]
    others = [*unread(context.results), *hyperparams.unread(context.results)]
    return [*lines, *store.skipped, *store.disagreements(), *others]


def _describe_table(
    context: Context, table: Table, tables: Sequence[Table], figures: Collection[str]
) -> dict[str, Any]:
    """A table in the form that the template expects."""
    known = {label: anchor(table.name, label) for label in table.records}
    records = [{str(name): str(cell) for name, cell in row.items()} for row in table.frame.to_dict("records")]
    titles = {name: _name_figure(name) for name in figures} | {one.name: one.title.split(":")[0] for one in tables}
    titles |= {folder: about.short for folder, about in BLOCKS.items() if folder in titles}
    small = IN_SMALL.get(table.name, "")
    numeric = {name for name in table.frame.columns if _is_numeric([row[name] for row in records])}
    return {
        "name": table.name,
        "folder": table.folder,
        "title": table.title,
        "notes": table.notes,
        "columns": [{"name": name, "css": "num" if name in numeric else ""} for name in table.frame.columns],
        "rows": [
            [_cell(table, row, name, known, titles, name in numeric) for name in table.frame.columns] for row in records
        ],
        "details": cell_details(context, table),
        "is_bare": table.is_bare,
        "is_detail": table.name.startswith("evidence_") and table.name.endswith(("_tasks", "_orders")),
        "missing": table.coverage[1] - table.coverage[0],
        "command": _command(table.name),
        "in_small": {"href": small, "title": BLOCKS[small].title} if small in titles else None,
    }


def _name_figure(name: str) -> str:
    return re.sub(r"figure(\d)", r"Figure \1", name) if name.startswith("figure") else f"figure: {name}"


def _is_numeric(texts: Sequence[str]) -> bool:
    """Whether a column holds numbers; cells without a value do not matter, one in five may be other text."""
    filled = [text for text in texts if text and text not in WORDS]
    return bool(filled) and sum(bool(NUMBER.fullmatch(text)) for text in filled) >= 0.8 * len(filled)


def _cell(
    table: Table, row: Mapping[str, str], name: str, known: Mapping[str, str], titles: Mapping[str, str], numeric: bool
) -> dict[str, Any]:
    """One cell: text, CSS class, the anchor of its details if it has records, and links if it names tables."""
    text = row[name]
    href = known.get(_label(table, row, name), "") if text != MISSING else ""
    css = " ".join(
        part for part in (_css(text), "num" if numeric and (NUMBER.fullmatch(text) or text in WORDS) else "") if part
    )
    names = text.split(", ") if name == BASED_ON else []
    links = [{"href": one if one in titles else "", "text": titles.get(one, one)} for one in names]
    return {"text": text, "css": css, "href": href, "links": links}


def _label(table: Table, row: Mapping[str, str], name: str) -> str:
    """The label in `records` of a cell."""
    if table.name.startswith(EVIDENCE):
        return f"{row.get('method')} {row['task'] if name == 'score' else name}"
    return table.label_of(row) if name.startswith(OURS) else ""


def _command(name: str) -> str:
    """The command that makes the runs of a table."""
    if (folder := name.removesuffix("_tasks")) in BLOCKS:
        return block_command(folder)
    if name in comparison.PLANS:
        return comparison.PLANS[name].command
    known = {
        "table13_mini": "table13 SCALE=mini DATA=glue",
        "basis_study": "basis DATA=glue",
        "quality_energy": "quality",
        "table3_measured": "table3",
    }
    target = known.get(name) or (name if re.fullmatch(r"table\d+|section8", name) else "")
    return f"make reproduce-{target}" if target else "make report"


def _count_failed(context: Context) -> int:
    """Number of failed runs; trials of a search do not count, because a rate that is too high is one of its results."""
    failed = [record for record in context.store.records.values() if record["status"] == "failed"]
    return sum(not str(record.get("reason", "")).startswith(PRUNED) and not record.get("sweep") for record in failed)


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
