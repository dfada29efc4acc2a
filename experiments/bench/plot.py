"""Plot of the results: measured and predicted speed by arm, by tokens per step, and by width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.bench.arms import MAIN_ARMS
from experiments.bench.render import mark
from experiments.bench.shapes import find_shape
from experiments.palette import style_of_bench_arm
from sparsegrad.errors import UserError

_SWEPT = ("blocks", "padding", "rest", "precision", "mode", "density")
Points = dict[float, str]
"""Tokens per step or width -> key of the setting."""


def write_plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw the plot to `path`; its suffix selects the format.

    Raises:
        UserError: when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "no plot: matplotlib is not installed; pip install matplotlib, then run with --render"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        sweeps = {"tokens per step": tokens_sweep(document), "hidden width of the model": width_sweep(document)}
        sweeps = {name: points for name, points in sweeps.items() if len(points) > 1}
        widths = (1.3, *(1 for _ in sweeps))
        figure, axes = plt.subplots(
            1, len(widths), figsize=(4.8 * sum(widths), 5), layout="constrained", width_ratios=widths, squeeze=False
        )
        _bars(axes[0][0], document)
        panels = axes[0][1:]
        ends = [
            _lines(axis, document, points, name) for axis, (name, points) in zip(panels, sweeps.items(), strict=True)
        ]
        _label_lines(panels, ends)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def tokens_sweep(document: Mapping[str, Any]) -> Points:
    """The longest series of settings of one stack of MLPs that differ only in tokens per step."""
    return _longest(document, lambda setting: (setting["shape"],), lambda setting: setting["tokens"])


def width_sweep(document: Mapping[str, Any]) -> Points:
    """The longest series of settings of stacks of MLPs that differ only in width."""
    return _longest(
        document, lambda setting: (setting["tokens"],), lambda setting: float(find_shape(setting["shape"]).hidden)
    )


def _longest(document: Mapping[str, Any], same: Any, axis: Any) -> Points:
    series: dict[tuple[Any, ...], Points] = defaultdict(dict)
    for key, setting in document["settings"].items():
        if find_shape(setting["shape"]).is_stack and document["summary"].get(key):
            # Settings of one series agree in everything but the axis.
            series[(*same(setting), *(setting[name] for name in _SWEPT))][axis(setting)] = key
    return max(series.values(), key=len, default={})


def _bars(axes: Any, document: Mapping[str, Any]) -> None:
    """Speed relative to full fine-tuning in the setting with the most arms; the range over processes as a line."""
    summary = document["summary"]
    key = max(summary, key=lambda name: len(summary[name]), default=None)
    if key is None:
        return
    arms = [arm for arm, found in summary[key].items() if found["speed"]["full"]]
    ratios = [summary[key][arm]["speed"]["full"] for arm in arms]
    reach = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    colours = [style_of_bench_arm(arm).colour for arm in arms]
    axes.barh(arms, [r["median"] for r in ratios], xerr=reach, color=colours, ecolor="#555555", height=0.7)
    predicted = document["settings"][key]["predicted"]["full"]
    known = [arm for arm in arms if arm in predicted]
    axes.plot([predicted[arm] for arm in known], known, "|", color="#111111", markersize=13, markeredgewidth=1.6)
    for arm, ratio in zip(arms, ratios, strict=True):
        end, tick = ratio["max"], predicted.get(arm, 0)
        if -0.05 < tick - end < 0.2:  # not over the tick; a tick further away leaves room
            end = max(end, tick)
        axes.annotate(
            f"{ratio['median']:.2f}{mark(ratio)}", (end, arm), (6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.axvline(1, color="gray", linewidth=0.8, zorder=0)
    axes.margins(x=0.08)
    title = f"{document['settings'][key]['label']}\nblack tick: predicted from the MLP linears alone"
    if any("mixed" in ratio for ratio in ratios):
        title += "\n†: the two methods by different commits"
    axes.set(title=title, xlabel="speed, steps/s over full fine-tuning")


def _lines(axes: Any, document: Mapping[str, Any], points: Points, name: str) -> list[tuple[float, float, str, str]]:
    """Draw one line per arm, and a dashed one for its prediction; the ends (x, y, arm, colour) of the measured ones."""
    ends, is_mixed = [], False
    for arm in MAIN_ARMS:
        style = style_of_bench_arm(arm)
        summaries = {x: document["summary"][key].get(arm) for x, key in points.items()}
        found = {x: one["speed"]["full"] for x, one in summaries.items() if one}
        xs = sorted(x for x, ratio in found.items() if ratio)
        if not xs:
            continue
        measured = [found[x]["median"] for x in xs]
        predictions = [document["settings"][points[x]]["predicted"]["full"] for x in xs]
        axes.plot(xs, measured, marker=style.marker, color=style.colour)
        mixed = [x for x in xs if "mixed" in found[x]]
        faces = {"markerfacecolor": "white", "color": style.colour, "linestyle": "none"}
        axes.plot(mixed, [found[x]["median"] for x in mixed], marker=style.marker, **faces)
        is_mixed |= bool(mixed)
        axes.plot(xs, [one.get(arm) for one in predictions], "--", color=style.colour, linewidth=0.9)
        ends.append((xs[-1], measured[-1], arm, style.colour))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(points), [f"{x:g}" for x in sorted(points)])
    axes.minorticks_off()
    hollow = "\nhollow: the two methods by different commits" * is_mixed
    axes.set(title=f"by {name}\nsolid: measured, dashed: predicted{hollow}", xlabel=name)
    axes.set_ylabel("speed, steps/s over full fine-tuning")
    return ends


def _label_lines(panels: Any, ends: list[list[tuple[float, float, str, str]]]) -> None:
    from experiments.labels import label_ends  # needs matplotlib

    for axes, found in zip(panels, ends, strict=True):
        label_ends(axes, found)
