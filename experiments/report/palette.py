"""One colour, marker and name per method, used by every figure and table.

The colours are those of Okabe and Ito, which people with a colour vision deficiency can distinguish; the markers carry
the same information without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """How a method is drawn and named."""

    colour: str
    marker: str
    name: str


STYLES = {
    "full": Style("#000000", "o", "full fine-tuning"),
    "lora": Style("#56B4E9", "v", "LoRA as in the paper"),
    "lora_authors": Style("#56B4E9", "<", "LoRA as in the authors' code"),
    "lora_tuned": Style("#0072B2", "^", "LoRA, alpha = 2 rank"),
    "meprop": Style("#E69F00", "s", "MeProp"),
    "sparsegrad": Style("#D55E00", "D", "SparseGrad exact"),
    "sparsegrad_small": Style("#D55E00", "P", "SparseGrad, small side"),
    "sparsegrad_authors": Style("#CC79A7", "X", "SparseGrad as in the authors' code"),
    "sparsegrad_fast": Style("#009E73", "*", "SparseGrad fast (not exact)"),
    "static_mask": Style("#7F7F7F", "p", "static mask"),
    "random_mask": Style("#B0A000", "h", "random mask"),
}
OTHER = Style("#7F7F7F", ">", "")
SERIES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # for lines without a method
MARKERS = ("o", "D", "^", "s", "X", "v", "*")


def style_of(arm: str) -> Style:
    """The style of an arm such as `sparsegrad` or `sparsegrad density=0.05`; options become part of the name."""
    method, _, options = arm.partition(" ")
    if arm in ALIASES:
        return STYLES[ALIASES[arm]]
    base = STYLES.get(method, OTHER)
    name = ", ".join(part for part in (base.name or method, options) if part)
    return Style(base.colour, base.marker, name)


ALIASES = {"sparsegrad sides=small": "sparsegrad_small"}  # variants with a style of their own


def order_of(arm: str) -> tuple[int, str]:
    """Sort key: the order of `STYLES`, then the options."""
    known = list(STYLES)
    method = ALIASES.get(arm, arm.partition(" ")[0])
    return (known.index(method) if method in known else len(known), arm)


def label_points(axis: Any, labels: Sequence[tuple[float, float, str]], gap: float = 11.0) -> None:
    """Write the labels (x, y, text) beside their points; labels that would overlap move apart, `gap` points at least.

    Call it when all points are drawn, because it uses the limits of the axis.
    """
    axis.autoscale_view()
    to_points = 72.0 / axis.figure.dpi
    placed: list[tuple[float, float]] = []
    for x, y, text in sorted(labels, key=lambda label: label[1]):
        across, up = (to_points * part for part in axis.transData.transform((x, y)))
        near = [top for left, top in placed if abs(left - across) < LABEL_WIDTH]
        height = max([up, *(top + gap for top in near)])
        placed.append((across, height))
        axis.annotate(text, (x, y), (7, 3 + height - up), textcoords="offset points", fontsize=8)


LABEL_WIDTH = 130.0  # points, of the longest name
