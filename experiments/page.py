"""results/report/index.html: one page without a network, with every table and figure, and links to the records."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.answers_page import has_answers
from experiments.collect import skipped_summary
from experiments.render import write_text
from experiments.tables.base import MISSING, Context, Table

TEMPLATES = Path(__file__).parent / "templates"
LONG = 48  # characters; a longer cell wraps
THEMES = {
    "light": {"ink": "#1c1e21", "soft": "#5d646e", "box": "#f3f5f8", "new": "#dfeaf8", "grad": "#b3401f"},
    "dark": {"ink": "#e6e8eb", "soft": "#a2a9b3", "box": "#20252b", "new": "#1f3550", "grad": "#f0946f"},
}


def write_figure1(folder: Path) -> list[Path]:
    """Our drawing of the signal flow, one SVG for light and one for dark backgrounds."""
    paths = []
    for theme, colours in THEMES.items():
        paths.append(folder / f"figure1-{theme}.svg")
        write_text(paths[-1], _template("figure1.svg.j2").render(colours) + "\n")
    return paths


def write_page(context: Context, tables: Sequence[Table], figures: Mapping[str, Path]) -> Path:
    """Render and write the page."""
    path = context.results / "report" / "index.html"
    shown = [{"title": title, "name": image.stem, "image": _base64(image)} for title, image in figures.items()]
    inline = _template("figure1.svg.j2").render({name: f"var(--{name})" for name in THEMES["light"]})
    facts: dict[str, Any] = {"tables": tables, "figures": shown, "figure1": Markup(inline)}
    facts |= {"problems": problems(context), "answers": has_answers(context.results)}
    write_text(path, _template("page.html.j2").render(facts | _environment(context), css=_css) + "\n")
    return path


def problems(context: Context) -> list[str]:
    """Records that were not used, and why."""
    store = context.store
    lines = [line for line in (skipped_summary(store),) if line]
    return [*lines, *store.skipped, *store.disagreements()]


def _template(name: str) -> Any:
    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=name.endswith("html.j2"), undefined=StrictUndefined).get_template(name)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _css(cell: object) -> Markup:
    """The class of a cell."""
    text = str(cell)
    if text.startswith("failed"):
        return Markup(' class="bad long"')
    if text == MISSING:
        return Markup(' class="missing"')
    return Markup(' class="long"') if len(text) > LONG else Markup("")


def _environment(context: Context) -> dict[str, Any]:
    found = [record.get("environment", {}) for _, record in sorted(context.store.records.items())]
    dates = sorted(one["finished"][:10] for one in found if one.get("finished"))
    lines = Counter(_line(one) for one in found if one)
    ends = {"first": dates[0] if dates else "", "last": dates[-1] if dates else ""}
    return {"record_count": len(found), "environments": sorted(lines.items()), **ends}


def _line(environment: Mapping[str, Any]) -> str:
    hardware, versions = environment.get("hardware", {}), environment.get("versions", {})
    what = [str(hardware.get(name)) for name in ("gpu", "cpu", "system") if hardware.get(name)]
    what += [f"{hardware.get('cores')} cores", f"{hardware.get('threads')} threads"]
    return ", ".join([*what, *(f"{name} {number}" for name, number in versions.items())])
