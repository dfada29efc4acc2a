"""Figures 2 and 3, basis study, ablation, and score over hours, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.labels import INK, label_ends
from experiments.palette import BASES, style_of
from experiments.report import score_hours
from experiments.report.figure_data import read_figure_data
from experiments.report.tables import ablation, basis
from experiments.report.tables.base import MINI_MARK, Context
from sparsegrad.files import write_bytes
from sparsegrad.progress import track

VIEWS = {"untouched": "unrotated", "rotated": "rotated (HOSVD)", "authors": "authors' basis"}
KINDS = ("intermediate", "output")
# Without dates and versions, the same data gives the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "figure.dpi": 110,
}


def draw_all(context: Context) -> dict[str, Path]:
    """Draw every figure whose data exists, as PNG and PDF: title -> PNG."""
    names = track(FIGURES, "figures", unit="figures")
    return {title: path for name in names for title, path in draw(context, name).items()}


def draw(context: Context, name: str) -> dict[str, Path]:
    """Draw one figure as PNG and PDF: title -> PNG; empty if its data is missing."""
    title, make = FIGURES[name]
    # Start from the defaults: Optuna's plots change the style of the whole process.
    with plt.style.context(["default", _STYLE]):
        figure = make(context)
        if figure is None:
            return {}
        return {f"{title} ({MINI_MARK})": save(figure, context.results / "figures" / f"{name}.png")}


def energies(context: Context) -> list[str]:
    """One line per layer kind of figure 2: share of the energy in the largest 1 % of entries."""
    data = read_data(context, "figure2")
    if data is None:
        return []
    where = f"block {data['block']}, step {data['step']}"
    shares = {
        kind: ", ".join(f"{label} {100 * views[view]['top_1_percent']:.1f} %" for view, label in VIEWS.items())
        for kind, views in data["kinds"].items()
    }
    return [f"{where}, {kind}: the largest 1 % holds {said}" for kind, said in shares.items()]


def save(figure: Figure, path: Path) -> Path:
    """Save as PNG at `path` and as PDF next to it; equal figures give equal bytes."""
    for kind, metadata in _METADATA.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
        write_bytes(path.with_suffix(f".{kind}"), buffer.getvalue())
    plt.close(figure)
    return path


def read_data(context: Context, name: str) -> dict[str, Any] | None:
    """The data that `python -m experiments.studies.gradients` measured for a figure, or None.

    Raises:
        UserError: when it cannot be read.
    """
    return read_figure_data(context.results, name)


def figure2(context: Context) -> Figure | None:
    """Heat maps of one block's gradients in three bases, for both layer kinds."""
    data = read_data(context, "figure2")
    if data is None:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(8, 5.2), layout="constrained")
    for line, kind in zip(axes, KINDS, strict=True):
        for axis, (view, label) in zip(line, VIEWS.items(), strict=True):
            found = data["kinds"][kind][view]
            levels = [[float(value) for value in row.split()] for row in found["log10"]]
            image = axis.imshow(levels, aspect="auto", vmin=-4, vmax=0, cmap="magma", interpolation="nearest")
            axis.set_title(f"{label}\ntop 1 % holds {100 * found['top_1_percent']:.0f} %", fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(f"{kind}\n{found['shape'][0]} outputs x {found['shape'][1]} inputs")
    figure.colorbar(image, ax=axes, label="log10 |gradient| / largest, by patch", shrink=0.8)
    where = f"block {data['block']}, step {data['step']}, {data['model']}, {data['task']}"
    figure.suptitle(f"MLP weight gradients: {where}", fontsize=10)
    return figure


def figure3(context: Context) -> Figure | None:
    """Rows of dL/dY with a gradient, and the distribution of the share of non-zero entries, for both paddings."""
    data = read_data(context, "figure3")
    if data is None:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.4), layout="constrained")
    for line, (pad, label) in zip(axes, PADS.items(), strict=True):
        rows = data["pictures"][pad]["intermediate"]["row_share"]
        line[0].imshow([[share] * 60 for share in rows], aspect="auto", cmap="Greys", vmin=0, vmax=1)
        line[0].set(xticks=[], xlabel="features of dL/dY", ylabel="tokens of the batch")
        line[0].set_title(f"block {data['block']}, {label}:\ntokens with a gradient in black", fontsize=9)
        bins = [i / 40 for i in range(41)]
        line[1].hist(_shares(data, pad, "intermediate"), bins=bins, color="#C8CCD2", label="intermediate layers")
        line[1].hist(_shares(data, pad, "output"), bins=bins, histtype="step", color="#D55E00", label="output layers")
        line[1].set(xlabel="share of non-zero entries of dL/dY", ylabel="blocks x steps")
        line[1].set_title(f"all blocks, {label}", fontsize=9)
        share, top = _real(data, pad), line[1].get_ylim()[1]
        line[1].set_ylim(0, 1.15 * top)  # room for the name of the line
        line[1].axvline(share, color=INK, linestyle="--", linewidth=1)
        line[1].text(share, 1, " real tokens, mean", transform=line[1].get_xaxis_transform(), va="top", fontsize=8)
    axes[0][1].legend(fontsize=8, loc="right", frameon=False)  # nothing is drawn there
    figure.suptitle(
        "dL/dY is striped because padding tokens get no gradient (in the last block, only the first token does)",
        size=10,
    )
    return figure


PADS = {"max_length": "padded to 128", "longest": "padded to the longest row"}


def _shares(data: dict[str, Any], pad: str, kind: str) -> list[float]:
    return [share for row in data["shares"] if row["pad"] == pad for share in row["nonzero"][kind]]


def _real(data: dict[str, Any], pad: str) -> float:
    return float(mean(row["real_tokens"] for row in data["shares"] if row["pad"] == pad))


def basis_study(context: Context) -> Figure | None:
    """Energy in the largest 1 % during training, one line per basis."""
    data = basis.read(context.results)
    if data is None:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    ends = []
    for axis, kind in zip(axes, KINDS, strict=True):
        for name, label in basis.NAMES.items():
            line, look = basis.kept_energy(data, name, kind), BASES[name]
            axis.plot(list(line), list(line.values()), marker=look.marker, markersize=4, color=look.colour)
            ends.append((*list(line.items())[-1], label, look.colour))
        axis.set(title=f"{kind} layers", xlabel="training step", ylim=(0, 1))
    axes[0].set_ylabel("share of the gradient's energy\nin the largest 1 % of entries")
    label_ends(axes[1], ends[len(basis.NAMES) :])
    return figure


def ablation_curve(context: Context) -> Figure | None:
    """Score over density: published and ours for the paper's models, ours for MiniLM; ours with an error band."""
    points = ablation.evidence_curve(context)
    figure, axes = plt.subplots(1, 1 + bool(points), figsize=(4.8 * (1 + bool(points)), 3.4), layout="constrained")
    first = axes[0] if points else axes
    ends = []
    for (number, model), marker in zip(ablation.MODELS.items(), ("o", "s"), strict=True):
        published = list(ablation.published_curve(number))
        first.plot(*zip(*published, strict=True), marker=marker, color=style_of("sparsegrad").colour, markersize=4)
        ends.append((*published[-1], f"{model}, published", style_of("sparsegrad").colour))
        measured = ablation.curve(context, number)
        _band(first, measured, style_of("full").colour)
        ends += [(one.share, one.value.mean, f"{model}, ours", style_of("full").colour) for one in measured[-1:]]
    first.set_title("paper's models" if points else "paper's models (MiniLM: not run yet)")
    for axis in axes if points else [first]:
        axis.set(xscale="log", xlim=(0.5, 150), xlabel="kept entries, %", ylabel="average score, points")
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    if points:
        _band(axes[1], points, style_of("sparsegrad").colour)
        axes[1].set_title("MiniLM, ours: mean ± sample std over seeds")
    label_ends(first, ends)
    return figure


def _band(axis: Any, points: list[ablation.Point], colour: str) -> None:
    """A line of means with a band of one sample standard deviation on each side."""
    if not points:
        return
    shares, means = [point.share for point in points], [point.value.mean for point in points]
    spread = [point.value.std or 0.0 for point in points]
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axis.plot(shares, means, marker="D", markersize=4, color=colour)
    axis.fill_between(shares, low, high, alpha=0.25, color=colour)


FIGURES: dict[str, tuple[str, Callable[[Context], Figure | None]]] = {
    "score_hours": ("Score over hours to full fine-tuning's score minus one point", score_hours.draw),
    "figure2": ("Figure 2: gradients before and after rotation", figure2),
    "figure3": ("Figure 3: the stripes of dL/dY are padding", figure3),
    "basis": ("Basis study: energy in the largest 1 % during training", basis_study),
    "ablation": ("Appendix C: score by kept entries, published and measured", ablation_curve),
}
