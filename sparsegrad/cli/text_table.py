"""A table of plain text that fits a terminal: columns are left out, by rank, but no cell is ever cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

GAP = "  "
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ± \S+)?( %)?|-|")


@dataclass(frozen=True)
class Column:
    """A column of texts.

    Attributes:
        title: its head; one or two lines.
        cells: one text per row.
        rank: 0 is always shown; of the others the highest rank is left out first.
    """

    title: str
    cells: Sequence[str]
    rank: int = 0

    @property
    def width(self) -> int:
        """The widest line in characters."""
        return max(len(text) for text in (*self.title.split("\n"), *self.cells))


def fit(columns: Sequence[Column], width: int | None) -> tuple[list[Column], list[Column]]:
    """Split columns into those that `width` characters have room for, in their order, and those left out.

    Columns of rank 0 stay even where they are wider than that. None: there is no limit.
    """
    shown = list(columns)
    while width is not None and _total(shown) > width and any(column.rank for column in shown):
        worst = max(column.rank for column in shown)
        # Of equal ranks the last one goes first. By identity: two columns can have the same content.
        index = max(number for number, column in enumerate(shown) if column.rank == worst)
        del shown[index]
    return shown, [column for column in columns if all(column is not one for one in shown)]


def render(columns: Sequence[Column]) -> str:
    """The lines of the table: heads, a rule, one line per row. Columns of numbers are aligned to the right."""
    right = [all(_NUMBER.fullmatch(cell) for cell in column.cells) for column in columns]
    heads = [column.title.split("\n") for column in columns]
    height = max(map(len, heads))
    heads = [[""] * (height - len(head)) + head for head in heads]  # one-line heads stand on the lower line
    lines = [[head[number] for head in heads] for number in range(height)]
    lines.append(["-" * column.width for column in columns])
    lines += [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    widths = [column.width for column in columns]
    return "\n".join(
        GAP.join(
            text.rjust(wide) if is_right else text.ljust(wide)
            for text, wide, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)
