"""The figure of a comparison: average scores with their intervals, the best on top."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from experiments.palette import style_of
from sparsegrad.files import write_bytes


def draw(rows: Sequence[tuple[str, float, tuple[float, float] | None]], path: Path) -> None:
    """Write the figure as PNG.

    Args:
        rows: (arm, average, its 95 % interval or None), the best first.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.3 * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    for place, (arm, value, interval) in enumerate(reversed(rows)):
        style = style_of(arm)
        if interval is not None:
            axis.plot(interval, (place, place), color=style.colour, linewidth=1.5)
        axis.plot(value, place, style.marker, color=style.colour)
    axis.set_yticks(range(len(rows)), [style_of(arm).name for arm, _, _ in reversed(rows)])
    axis.set_xlabel("average score, 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
