"""Labels of figures: beside their points, apart from each other, and one look per method in every figure."""

from __future__ import annotations

import random
from itertools import pairwise

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from experiments.bench.arms import ARMS
from experiments.labels import label_ends, label_points, spread
from experiments.palette import BENCH_ARMS, OTHER, STYLES, style_of, style_of_bench_arm

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.mark.parametrize("seed", range(5))
def test_crowded_heights_move_apart_and_keep_their_order(seed: int) -> None:
    heights = [random.Random(seed).uniform(0, 60) for _ in range(8)]
    moved = spread(heights, 10)
    order = sorted(range(8), key=heights.__getitem__)
    assert all(moved[high] - moved[low] >= 10 - 1e-9 for low, high in pairwise(order))
    assert sum(moved) == pytest.approx(sum(heights))  # around the middle of the crowd
    assert spread([0, 50, 100], 10) == [0, 50, 100]


def boxes(axis: plt.Axes) -> list[Bbox]:
    axis.figure.draw_without_rendering()
    # Without the lines to their points, which annotations include.
    return [Text.get_window_extent(text) for text in axis.texts if text.get_text()]


def overlapping(found: list[Bbox]) -> int:
    return sum(Bbox.intersection(a, b) is not None for n, a in enumerate(found) for b in found[:n])


def test_labels_of_close_points_do_not_overlap() -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    points = [(1.0, 5.0, "first"), (1.0, 5.01, "second"), (1.01, 5.0, "third one"), (2.0, 9.0, "far")]
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    axis.margins(x=0.3)
    label_points(axis, points, [(1.0, 3.0, 7.0)])
    found = boxes(axis)
    assert len(found) == len(points)
    assert overlapping(found) == 0
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in found)
    plt.close(figure)


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for height in (1.0, 1.001, 1.002, 5.0):
        axis.plot([0, 1], [0, height])
    label_ends(axis, [(1, height, f"line {height}", "black") for height in (1.0, 1.001, 1.002, 5.0)])
    found = boxes(axis)
    assert overlapping(found) == 0
    assert min(box.x0 for box in found) > axis.get_window_extent().x1
    plt.close(figure)


def test_an_arm_of_the_benchmark_looks_like_its_method() -> None:
    for arm, method in (("exact", "sparsegrad"), ("fast", "sparsegrad_fast"), ("lora_peft", "lora"), ("full", "full")):
        assert style_of_bench_arm(arm).colour == style_of(method).colour
    assert style_of_bench_arm("merged").colour == style_of_bench_arm("exact").colour
    assert all(style_of_bench_arm(arm).colour != OTHER.colour for arm in ARMS)
    assert set(BENCH_ARMS.values()) <= set(STYLES)
