"""The figure of a comparison: average scores with their intervals, the best on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.palette import style_of

PICTURES = (".png", ".pdf")


@dataclass(frozen=True)
class Point:
    """One row of the figure.

    Attributes:
        arm: decides its look.
        label: its name.
        value: average score.
        interval: the 95 % interval of `value`, or None.
        is_partial: whether the average is over fewer tasks than that of others; such a point is hollow.
    """

    arm: str
    label: str
    value: float
    interval: tuple[float, float] | None
    is_partial: bool


def draw(points: Sequence[Point], unit: str, path: Path) -> None:
    """Write the figure as PNG, and as PDF beside it.

    Args:
        points: the best first.
        unit: what `value` is, for the axis.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    from experiments.report.figures import save

    figure = Figure(figsize=(7, 1.2 + 0.3 * len(points)), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    for place, point in enumerate(reversed(points)):
        style = style_of(point.arm)
        if point.interval is not None:
            axis.plot(point.interval, (place, place), color=style.colour, linewidth=1.5)
        face = "white" if point.is_partial else style.colour
        axis.plot(point.value, place, style.marker, color=style.colour, markerfacecolor=face)
    axis.set_yticks(range(len(points)), [point.label for point in reversed(points)])
    axis.set_xlabel(f"{unit}, 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def remove_figure(path: Path) -> None:
    """Delete what `draw` wrote for this path."""
    for suffix in PICTURES:
        path.with_suffix(suffix).unlink(missing_ok=True)
