"""Update the measured tables of docs/reliability.md (kills, fuzzing, soak) from results/reliability.

python -m experiments.reliability.page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paths import ROOT
from sparsegrad.files import read_json, write_text

PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "results" / "reliability"
MISSING = "Not measured yet."


def kills(facts: Mapping[str, Any]) -> str:
    """Table of kills, one row per method."""
    signals = ("SIGKILL", "SIGTERM", "SIGINT", "full disk")
    names = ("kills", *signals, "cut_checkpoints", "records_compared")
    rows = [
        [row["method"], *(str(row[name]) for name in names), "yes" if row["equal"] else "**no**"]
        for row in facts["methods"]
    ]
    return table(["method", "kills", *signals, "checkpoints cut", "records compared", "all equal"], rows)


def fuzz_section(facts: Mapping[str, Any]) -> str:
    """Table of fuzzing, one row per reader, and the totals."""
    names = ("inputs", "refused", "accepted", "defect")
    rows = [[reader, *(f"{found[name]:,}" for name in names)] for reader, found in facts["readers"].items()]
    head = table(["reader of", "inputs", "refused", "accepted", "defects"], rows)
    return f"{head}\n\n{facts['inputs']:,} inputs of seed {facts['seed']}, {facts['defects']} defects."


def soak_section(facts: Mapping[str, Any]) -> str:
    """The result of the soak test in one paragraph."""
    low, high = facts["interval"]
    return (
        f"{facts['about']}: {facts['hours']:.2f} hours, {facts['samples']:,} samples; slope "
        f"{facts['slope_mib_per_hour']:+.2f} MiB per hour ({facts['level']:.0%} interval {low:+.2f} to {high:+.2f}), "
        f"peak {facts['peak_mib']:.0f} MiB."
    )


BLOCKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "kills": ("kills.json", kills),
    "fuzz": ("fuzz.json", fuzz_section),
    "soak": ("soak.json", soak_section),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_blocks(page: str, results: Path) -> str:
    """The page with every block between its `<!-- name -->` comments rendered from the files in `results`."""
    for name, (file, render) in BLOCKS.items():
        path = results / file
        text = render(read_json(path)) if path.is_file() else MISSING
        block = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
        old = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        page = old.sub(block.replace("\\", r"\\"), page)  # a backslash is special in a replacement
    return page


def main() -> int:
    """Rewrite the page in place."""
    write_text(PAGE, fill_blocks(PAGE.read_text(), RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
