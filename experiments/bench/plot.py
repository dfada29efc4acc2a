"""Plot of the results: measured and predicted speed by arm, by tokens per step, and by width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.bench.arms import ARMS, MAIN_ARMS
from experiments.bench.shapes import find_shape
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

    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _bars(axes[0], document)
    _lines(axes[1], document, tokens_sweep(document), "tokens per step")
    _lines(axes[2], document, width_sweep(document), "width of the model")
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
    """Speed relative to full fine-tuning in the setting with the most arms."""
    summary = document["summary"]
    key = max(summary, key=lambda name: len(summary[name]), default=None)
    if key is None:
        return
    arms = [arm for arm in ARMS if (summary[key].get(arm) or {}).get("speed", {}).get("full")]
    ratios = [summary[key][arm]["speed"]["full"] for arm in arms]
    reach = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    axes.barh(arms, [r["median"] for r in ratios], xerr=reach, color="tab:blue", label="measured")
    predicted = document["settings"][key]["predicted"]["full"]
    axes.plot([predicted[arm] for arm in arms], arms, "k|", markersize=14, label="predicted from the MLP linears alone")
    axes.invert_yaxis()
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set(title=document["settings"][key]["label"], xlabel="steps/s over full fine-tuning")
    axes.legend(loc="lower right")


def _lines(axes: Any, document: Mapping[str, Any], points: Points, name: str) -> None:
    for number, arm in enumerate(MAIN_ARMS):
        found = {x: document["summary"][key].get(arm, {}).get("speed", {}).get("full") for x, key in points.items()}
        xs = sorted(x for x, ratio in found.items() if ratio)
        predicted = [document["settings"][points[x]]["predicted"]["full"][arm] for x in xs]
        axes.plot(xs, [found[x]["median"] for x in xs], "o-", color=f"C{number}", label=arm)
        axes.plot(xs, predicted, "--", color=f"C{number}")
    if points:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(points), [f"{x:g}" for x in sorted(points)])
        axes.minorticks_off()
    axes.set(title="dashed: predicted", xlabel=name, ylabel="steps/s over full fine-tuning")
    axes.legend()
