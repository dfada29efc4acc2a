"""Tables as Markdown, LaTeX (booktabs) and CSV, written atomically."""

from __future__ import annotations

from pathlib import Path

from experiments.report.tables.base import Table
from sparsegrad.files import write_text

_LATEX = {
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "%": r"\%",
    "_": r"\_",
    "^": r"\^{}",
    "~": r"\~{}",
    "#": r"\#",
    "&": r"\&",
    "<": "$<$",
}
SUFFIXES = (".md", ".tex", ".csv")  # of a table's files, in the order in which they are written


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write a table in all three formats; returns the paths.

    Raises:
        UserError: when the folder cannot be written.
    """
    assert not table.frame.isna().any(axis=None), f"{table.name}: an empty cell is an empty text"
    texts = (markdown(table), latex(table), table.frame.to_csv(index=False, lineterminator="\n"))
    paths = [folder / f"{table.name}{suffix}" for suffix in SUFFIXES]
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def markdown(table: Table) -> str:
    """The table as Markdown, with title and notes."""
    cells = table.frame.map(lambda cell: str(cell).replace("|", "\\|"))
    grid = cells.to_markdown(index=False, disable_numparse=True)
    return f"## {table.title}\n\n{grid}\n\n" + "".join(f"- {note}\n" for note in table.notes)


def latex(table: Table) -> str:
    """The table as a booktabs tabular in a table environment, without notes."""
    frame = table.frame.map(_escape)
    frame.columns = [_escape(name) for name in frame.columns]
    return frame.to_latex(index=False, escape=False, caption=_escape(table.title), label=f"tab:{table.name}")


def _escape(text: object) -> str:
    return "".join(_LATEX.get(character, character) for character in str(text))
