"""Optuna's plots of a study, with the metric's name in place of "Objective Value", and labels that do not overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study

from sparsegrad.sweeps.ledger import find_winner
from sparsegrad.sweeps.study import IDENTITY

BEST, OTHERS, INK = (
    "#D55E00",
    "#9AA0A8",
    "#222222",
)  # vermilion, which people with a colour vision deficiency see too, and gray

# File name -> (function of `optuna.visualization` and `optuna.visualization.matplotlib`, title).
PLOTS = {
    "history": ("plot_optimization_history", "{metric} of each trial"),
    "intermediate": ("plot_intermediate_values", "{metric} during training, best trial in colour"),
    "importance": ("plot_param_importances", "which setting changes {metric} most"),
    "slice": ("plot_slice", "{metric} by setting"),
    "parallel": ("plot_parallel_coordinate", "the settings of each trial, and its {metric}"),
}


def draw_png(study: Study, name: str, path: Path) -> None:
    """Draw a plot of `PLOTS` with matplotlib."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    function: Any = getattr(plots, PLOTS[name][0])
    plt.close("all")
    function(study, **_target(study, name))
    figure = plt.gcf()
    figure.set_size_inches(9 if name == "parallel" else 8, 5)
    if name in _CORRECTIONS:
        _CORRECTIONS[name](study, figure)
    for axis in figure.axes:
        for side in ("left", "center"):
            axis.set_title("", loc=side)
    figure.suptitle(_title(study, name), fontsize=12)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close("all")


def draw_html(study: Study, name: str, path: Path) -> None:
    """Draw a plot of `PLOTS` with plotly, as a page."""
    from optuna import visualization

    figure = getattr(visualization, PLOTS[name][0])(study, **_target(study, name))
    figure.update_layout(title=_title(study, name))
    if name == "intermediate":
        figure.update_layout(xaxis_title="evaluation", yaxis_title=metric_of(study))
    figure.write_html(path, include_plotlyjs="cdn")


def metric_of(study: Study) -> str:
    """The name of what a study searches for, such as `accuracy`."""
    names = study.metric_names or [study.user_attrs.get(IDENTITY, {}).get("metric") or "score"]
    return str(names[0])


def _target(study: Study, name: str) -> dict[str, str]:
    return {} if name == "intermediate" else {"target_name": metric_of(study)}


def _title(study: Study, name: str) -> str:
    return f"{study.study_name}: {PLOTS[name][1].format(metric=metric_of(study))}"


def _mark_best(study: Study, figure: Any) -> None:
    """One colour for the best trial and gray for the others: a legend of every trial would be longer than the plot."""
    axis, winner = figure.axes[0], find_winner(study)
    best = None if winner is None else winner.number
    for line in axis.lines:
        is_best = line.get_label() == f"Trial{best}"
        line.set(color=BEST if is_best else OTHERS, alpha=1 if is_best else 0.6, zorder=3 if is_best else 2)
        if is_best and len(line.get_xdata()):
            end = (line.get_xdata()[-1], line.get_ydata()[-1])
            axis.annotate(f"trial {best}", end, (6, 0), textcoords="offset points", va="center", color=BEST)
    _remove_legends(figure)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="evaluation", ylabel=metric_of(study))


def _name_line(study: Study, figure: Any) -> None:
    """A label at the line's end in place of a legend."""
    axis = figure.axes[0]
    for line in axis.lines:
        end = (line.get_xdata()[-1], line.get_ydata()[-1])
        axis.annotate("best so far", end, (0, -6), textcoords="offset points", va="top", ha="right", color=INK)
    axis.margins(y=0.1)
    _remove_legends(figure)
    axis.set(xlabel="trial")


def _name_bars(study: Study, figure: Any) -> None:
    _remove_legends(figure)
    figure.axes[0].set(xlabel="importance, from 0 to 1", ylabel="")


def _remove_legends(figure: Any) -> None:
    for axis in figure.axes:
        if axis.get_legend() is not None:
            axis.get_legend().remove()


def _separate_scales(study: Study, figure: Any) -> None:
    """Move the colour bar away from the scale of the last setting, and keep lines off the numbers of the scales."""
    bar = next(axis for axis in figure.axes if axis.get_label() == "<colorbar>")
    place = bar.get_position()
    bar.set_position([place.x0 + 0.08, place.y0, place.width, place.height])
    for axis in figure.axes:
        for label in axis.get_yticklabels():  # of settings that are drawn between the lines
            label.set_bbox({"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1})


_CORRECTIONS: Mapping[str, Callable[[Study, Any], None]] = {
    "history": _name_line,
    "intermediate": _mark_best,
    "importance": _name_bars,
    "parallel": _separate_scales,
}
