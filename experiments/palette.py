"""One colour, marker and name per method, used by every figure and table.

The colours are those of Okabe and Ito, which people with a colour vision deficiency can distinguish; the markers carry
the same information without colour.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    "sparsegrad_layer": Style("#A34700", "d", "SparseGrad, the paper's layer"),
    "sparsegrad_authors": Style("#CC79A7", "X", "SparseGrad as in the authors' code"),
    "sparsegrad_fast": Style("#009E73", "*", "SparseGrad fast (not exact)"),
    "static_mask": Style("#7F7F7F", "p", "static mask"),
    "random_mask": Style("#B0A000", "h", "random mask"),
    "bitfit": Style("#BBBBBB", "x", "BitFit: biases and head"),
    "frozen": Style("#BBBBBB", ".", "head alone"),
}
OTHER = Style("#7F7F7F", ">", "")
# Bases instead of methods: a basis has the look of the method that trains in it.
BASES = {
    "none": STYLES["full"],
    "in-side": Style("#0072B2", "^", ""),
    "out-side": Style("#56B4E9", "v", ""),
    "both": STYLES["sparsegrad"],
    "authors": STYLES["sparsegrad_authors"],
    "random": STYLES["random_mask"],
}
ALIASES = {"sparsegrad sides=small": "sparsegrad_small"}  # variants with a style of their own
# Arms of the benchmark, by the first word of their name, -> methods.
BENCH_ARMS = {
    "exact": "sparsegrad",
    "merged": "sparsegrad",  # the earlier name of `exact`, in results that were measured before
    "layer": "sparsegrad_layer",
    "authors": "sparsegrad_authors",
    "fast": "sparsegrad_fast",
}


def style_of(arm: str) -> Style:
    """The style of an arm such as `sparsegrad` or `sparsegrad density=0.05`; options become part of the name."""
    method, _, options = arm.partition(" ")
    if arm in ALIASES:
        return STYLES[ALIASES[arm]]
    base = STYLES.get(method, OTHER)
    name = ", ".join(part for part in (base.name or method, options) if part)
    return Style(base.colour, base.marker, name)


def style_of_bench_arm(arm: str) -> Style:
    """The style of an arm of the benchmark, such as `exact_small`; its name stays the arm's, as in the tables."""
    if arm in ("exact_small", "exact_lean", "merged_small", "merged_lean"):
        base = STYLES["sparsegrad_small"]
    else:
        word = arm.partition("_")[0]
        base = STYLES.get(BENCH_ARMS.get(word, word), OTHER)
    return Style(base.colour, base.marker, arm)


def order_of(arm: str) -> tuple[int, str]:
    """Sort key: the order of `STYLES`, then the options."""
    known = list(STYLES)
    method = ALIASES.get(arm, arm.partition(" ")[0])
    return (known.index(method) if method in known else len(known), arm)
