"""Labels written beside points and lines, in place of legends; they do not cover each other or what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

INK, SIZE = "#222222", 8
GAP = 10.5  # points between the base lines of two labels
STEPS = 9  # places that are tried above and below a point, half a gap apart
OUTSIDE = 100.0  # cost of a place that leaves the axes, in labels overlapped

Span = tuple[float, float, float]


def label_points(axis: Any, labels: Sequence[tuple[float, float, str]], spans: Sequence[Span] = ()) -> None:
    """Write the labels (x, y, text) beside their points, where they cover neither each other nor anything drawn.

    Call it last, when all points are drawn: it uses the limits of the axis and the layout of the figure.

    Args:
        axis: of matplotlib.
        labels: one per point.
        spans: (x, low, high) of error bars, which labels avoid too.
    """
    axis.autoscale_view()
    axis.figure.draw_without_rendering()  # applies the layout, so that places in points are final
    frame, unit = axis.get_window_extent(), axis.figure.dpi / 72.0
    taken = [_box_of_point(axis, x, y, unit) for x, y, _ in labels]
    taken += [_box_of_span(axis, span, unit) for span in spans]
    for x, y, text in sorted(labels, key=lambda label: (-label[1], label[0])):
        note = axis.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=SIZE, color=INK, va="center")
        note.set_in_layout(False)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # a line below it stays off the letters
        size = note.get_window_extent()
        across, up = axis.transData.transform((x, y))
        places = [(side, step * GAP / 2) for step in _by_distance(STEPS) for side in (1, -1)]
        costs = []
        for side, rise in places:
            box = _place(across, up, size, side, rise, unit)
            covered = sum(_overlaps(box, other) for other in taken)
            costs.append(covered + OUTSIDE * (not _is_inside(box, frame)) + 0.01 * abs(rise) / GAP)
        best = min(range(len(places)), key=costs.__getitem__)
        side, rise = places[best]
        taken.append(_place(across, up, size, side, rise, unit))
        note.set(position=(7 * side, rise), ha="left" if side > 0 else "right")
        if abs(rise) > GAP:
            _draw_leader(axis, (x, y), side, rise)


def label_ends(axis: Any, lines: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the last points (x, y, name, colour) of lines; names that would overlap move apart.

    The names are outside the axes; the layout of the figure leaves them room.
    """
    axis.figure.draw_without_rendering()  # applies the layout, so that heights in points are final
    unit = axis.figure.dpi / 72.0
    heights = [axis.transData.transform((x, y))[1] / unit for x, y, _, _ in lines]
    back = axis.transData.inverted()
    for (x, y, text, colour), moved in zip(lines, spread(heights, GAP), strict=True):
        height = back.transform((0, moved * unit))[1]  # in data: the layout changes once more, to make room
        axis.annotate(
            text, (x, y), (1.04, height), textcoords=("axes fraction", "data"), fontsize=SIZE, color=INK, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved apart to at least `gap` in the same order, around the middle of each crowd."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    crowds: list[list[int]] = []
    for index in order:
        crowds.append([index])
        # A crowd that reaches into the one below joins it; the joined one may reach further down.
        while len(crowds) > 1 and _bottom(heights, crowds[-1], gap) - _top(heights, crowds[-2], gap) < gap:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    moved = list(heights)
    for crowd in crowds:
        for place, index in enumerate(crowd):
            moved[index] = _bottom(heights, crowd, gap) + place * gap
    return moved


def _bottom(heights: Sequence[float], crowd: Sequence[int], gap: float) -> float:
    return sum(heights[index] for index in crowd) / len(crowd) - gap * (len(crowd) - 1) / 2


def _top(heights: Sequence[float], crowd: Sequence[int], gap: float) -> float:
    return _bottom(heights, crowd, gap) + gap * (len(crowd) - 1)


def _by_distance(steps: int) -> list[int]:
    """0, 1, -1, 2, -2, ... up to `steps`."""
    return [0, *(sign * step for step in range(1, steps + 1) for sign in (1, -1))]


def _place(across: float, up: float, size: Bbox, side: int, rise: float, unit: float) -> Bbox:
    """The box (pixels) of a label beside a point: right of it (side 1) or left (-1), `rise` points higher."""
    left = across + 7 * unit if side > 0 else across - 7 * unit - size.width
    bottom = up + rise * unit - size.height / 2
    return Bbox.from_bounds(left, bottom, size.width, size.height)


def _box_of_point(axis: Any, x: float, y: float, unit: float) -> Bbox:
    across, up = axis.transData.transform((x, y))
    return Bbox.from_bounds(across - 4 * unit, up - 4 * unit, 8 * unit, 8 * unit)


def _box_of_span(axis: Any, span: Span, unit: float) -> Bbox:
    x, low, high = span
    (across, bottom), (_, top) = axis.transData.transform(((x, low), (x, high)))
    return Bbox.from_extents(across - 2 * unit, bottom, across + 2 * unit, top)


def _overlaps(one: Bbox, other: Bbox) -> bool:
    return Bbox.intersection(one, other) is not None


def _is_inside(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _draw_leader(axis: Any, point: tuple[float, float], side: int, rise: float) -> None:
    """A thin line from a point to its label, which is not next to it."""
    arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    note = axis.annotate("", point, (6 * side, rise), textcoords="offset points", arrowprops=arrow)
    note.set_in_layout(False)
