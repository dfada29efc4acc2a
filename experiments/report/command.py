"""Make tables and figures from the results on disk: `python -m experiments.report table4`, or `... all`.

Tables are written to results/tables as Markdown, LaTeX and CSV, figures to results/figures. With `all`, the comparisons
of `make compare` in results/compare, the page results/report/index.html and, if results/mtbench has answers,
results/report/answers.html are written too. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.paths import SCALES
from experiments.report import figures, findings
from experiments.report.answers_page import write_answers_page
from experiments.report.blocks import BLOCKS, IN_SMALL
from experiments.report.collect import collect_cells
from experiments.report.comparison.block import load_comparison
from experiments.report.comparison.notes import PLANS
from experiments.report.comparison.table import write_files
from experiments.report.page import problems, write_figure1, write_page
from experiments.report.render import markdown, write_table
from experiments.report.stale import remove_stale
from experiments.report.tables import (
    ablation,
    accuracy,
    architecture,
    basis,
    calibration,
    claims,
    correspondence,
    energy,
    exact,
    hyperparams,
    llama,
    main_tables,
    speed,
)
from experiments.report.tables.base import Context, Table
from sparsegrad.cli import replace_unprintable
from sparsegrad.errors import UserError, check_choice, check_integer, fail
from sparsegrad.files import check_writable
from sparsegrad.progress import job

Maker = Callable[[Context], Sequence[Table]]


def _speed(*names: str) -> Maker:
    def make(context: Context) -> Sequence[Table]:
        return [table for table in speed.tables(context) if table.name in (*names, "table3_measured")]

    return make


def _searched(number: int) -> Maker:
    def make(context: Context) -> Sequence[Table]:
        return [table for table in hyperparams.tables(context) if table.name in (f"table{number}", "table13_mini")]

    return make


def _block(folder: str) -> Maker:
    return lambda context: [*main_tables.block_tables(context, folder), *exact.block_tables(context, folder)]


# Name -> its tables at the paper's scale; `MINI` replaces some of them at the mini scale.
MAKERS: dict[str, Maker] = {
    "table1": lambda context: [architecture.table(context)],
    "table2": lambda context: [correspondence.table(context)],
    "table3": _speed("table3"),
    "table4": lambda context: [accuracy.per_task(context, 4)],
    "table5": lambda context: [accuracy.averages(context)],
    "table6": lambda context: [llama.table(context)],
    "table7": _speed("table7"),
    "table8": _speed("table8"),
    "table9": lambda context: [accuracy.per_task(context, 9)],
    "table10": lambda context: [accuracy.per_task(context, 10)],
    "table11": lambda context: [ablation.table(context, 11)],
    "table12": lambda context: [ablation.table(context, 12)],
    "table13": _searched(13),
    "table14": _searched(14),
    "table15": _searched(15),
    "section8": lambda context: [calibration.table(context)],
    "basis": lambda context: [basis.table(context)],
    "ablation": lambda context: [ablation.table(context, 11), ablation.table(context, 12)],
    "quality": lambda context: [energy.table(context)],
    "claims": lambda context: [claims.table(context)],
    "evidence": lambda context: [*main_tables.tables(context), *exact.tables(context)],
    **{folder: _block(folder) for folder in BLOCKS},
}
MINI: dict[str, Maker] = {
    **{name: _block(folder) for name, folder in IN_SMALL.items()},
    "ablation": _block("evidence_density"),
    "basis": lambda context: [*main_tables.block_tables(context, "evidence_basis"), basis.table(context)],
    "quality": lambda context: [*main_tables.block_tables(context, "evidence_paper"), energy.table(context)],
}
FIGURES = ("figure1", "figure2", "figure3")
CURVES = dict.fromkeys(("ablation", "table11", "table12"), "ablation") | {
    "basis": "basis"
}  # name -> figure that is drawn with its tables


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 and one line after bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("name", help=", ".join([*MAKERS, *FIGURES, "all"]))
    parser.add_argument("--scale", default="paper", help=", ".join(SCALES))
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--lines", type=int, help="of claims: print the ledger's first lines for the README, up to 3")
    options = parser.parse_args(arguments)
    replace_unprintable()
    try:
        check_choice("table", options.name, [*MAKERS, *FIGURES, "all"])
        check_choice("scale", options.scale, SCALES)
        if options.lines is not None:
            _print_lines(options.name, options.lines, options.results_dir)
        else:
            write_report(options.name, options.scale, options.results_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_lines(name: str, count: int, results: Path) -> None:
    """Print what holds, what does not, and what is open."""
    if name != "claims":
        raise fail("--lines", count, "only claims has lines", "run python -m experiments.report claims --lines 3")
    check_integer("--lines", count, at_least=1)
    print("\n".join(claims.lines(Context(results, collect_cells(results / "runs"), "mini"))[:count]))


def write_report(name: str, scale: str, results: Path) -> None:
    """Write the tables and figures of `name`; print tables, or the paths of figures and pages.

    Raises:
        UserError: when the data of a figure is missing, a file is damaged, or a file cannot be written.
    """
    check_writable(results / "tables")
    with job("reading records"):
        context = Context(results, collect_cells(results / "runs"), scale)
    if name in FIGURES:
        _figures(context, name)
        return
    tables = everything(context) if name == "all" else make(context, name)
    for table in tables:
        write_table(table, results / table.folder)
    if name == "all":
        drawn = _figures(context, "all")
        compared, pictures = write_comparisons(context)
        remove_stale(results, [*tables, *compared], pictures.values())
        print(write_page(context, [*tables, *compared], drawn | pictures))
        if answers := write_answers_page(results):
            print(answers)
    else:
        print("\n".join(markdown(table) for table in tables))
        for path in figures.draw(context, CURVES[name]).values() if name in CURVES else ():
            print(path)
    for line in problems(context):
        print(f"note: {line}", file=sys.stderr)


def make(context: Context, name: str) -> Sequence[Table]:
    """The tables of one name at the context's scale."""
    makers = MAKERS | MINI if context.scale == "mini" else MAKERS
    return makers[name](context)


def everything(context: Context) -> list[Table]:
    """Every table once: the ledger, the evidence, the findings, and the paper's tables."""
    makers: dict[str, Maker] = {
        **{name: MAKERS[name] for name in ("claims", "evidence")},
        "findings": lambda context: [findings.table(context)],
        **MAKERS,
    }
    found: list[Table] = []
    with job("tables", len(makers), unit="groups of tables") as bar:
        for name, maker in makers.items():
            bar.update(note=name)
            found += maker(context)
            bar.step()
    return list({table.name: table for table in found}.values())  # some names share a table


def write_comparisons(context: Context) -> tuple[list[Table], dict[str, Path]]:
    """Write the comparisons that have runs to results/compare; their tables, and title -> PNG.

    Raises:
        UserError: for a damaged plan or result, or a folder that cannot be written.
    """
    tables, drawn = list[Table](), dict[str, Path]()
    for folder in PLANS:
        if load_comparison(context, folder).blocks[folder].runs:
            tables.append(write_files(context, folder))
            figure = context.results / tables[-1].folder / f"{folder}.png"
            drawn |= {tables[-1].title: figure} if figure.is_file() else {}
    return tables, drawn


def _figures(context: Context, name: str) -> dict[str, Path]:
    """Draw one figure or all and print their paths: title -> PNG.

    Raises:
        UserError: when the data of the figure is missing.
    """
    drawings = write_figure1(context.results / "figures") if name in ("figure1", "all") else []
    drawn = figures.draw_all(context) if name == "all" else {}
    drawn |= figures.draw(context, name) if name in figures.FIGURES else {}
    for path in [*drawings, *drawn.values()]:
        print(path)
    if name == "figure2":
        print("\n".join(figures.energies(context)))
    if name in figures.FIGURES and not drawn:
        raise UserError(f"{name} has no data: make it with `make reproduce-{name} DATA=<glue folder>`")
    return drawn
