"""Intervals, corrected tests and power of the report's differences, where rows and seeds share the noise in any way."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.report.intervals import Noise, half_width, pooled_df

Task = tuple[float, float, float]
"""Standard deviations of the difference of two runs: of the rows, between seeds, and of the rows in each seed alone."""
MANY = 6_000


def repeat(tasks: list[Task], seeds: int | list[int], arms: int = 1) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Differences (arms, MANY) from one reference that is as good, with their noise: the arguments of `half_width`."""
    generator, share = np.random.default_rng(11), 1 / len(tasks) ** 2
    means, between, least = [], [], 0.0
    counts = [seeds] * len(tasks) if isinstance(seeds, int) else seeds
    for (rows, seed, own), count in zip(tasks, counts, strict=True):
        runs = generator.normal(0, rows / 2**0.5, (arms + 1, MANY, 1))
        runs = runs + generator.normal(0, np.hypot(seed, own) / 2**0.5, (arms + 1, MANY, count))
        values = runs[1:] - runs[0]
        means.append(values.mean(axis=2))
        between.append(share * values.var(axis=2, ddof=1) / count)
        least += share * own**2 / count
    known = np.array(tasks) ** 2 * share
    df = pooled_df(np.array(between), [count - 1 for count in counts])
    noise = {"rows": known[:, 0].sum(), "seeds": sum(between), "least": least, "df": df}
    return np.mean(means, axis=0), noise


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("tasks", "most"),
    [
        ([(0.0, 0.5, 0.0)], 0.96),
        ([(0.05, 0.5, 0.0)], 0.96),
        ([(0.1, 0.5, 0.0)], 0.96),  # Satterthwaite's quantile: 92.2 % with three seeds, and 13 % of six equal arms
        ([(0.3, 0.5, 0.0)], 0.97),
        ([(0.3, 0.2, 0.0)], 0.97),
        ([(0.5, 0.1, 0.1)], 0.97),
        ([(0.15, 0.2, 0.4)], 0.985),
        ([(0.1, 0.3, 0.0), (0.1, 1.5, 0.0)], 0.97),
        ([(0.1, 0.5, 0.0)] * 4, 0.98),
    ],
)
def test_intervals_and_corrected_tests_hold_what_they_promise(tasks: list[Task], most: float, seeds: int) -> None:
    """Coverage at any share of seeds and rows, and the chance that any of several equal arms differs after Holm."""
    values, noise = repeat(tasks, seeds, arms=6)
    assert 0.94 <= np.mean(np.abs(values) <= half_width(0.05, **noise)) <= most
    for arms in (2, 6):  # the first difference that Holm's procedure looks at decides whether any is found
        few = {name: value[:arms] if np.ndim(value) else value for name, value in noise.items()}
        found = np.abs(values[:arms]) > half_width(0.05 / arms, **few)
        assert found.any(axis=0).mean() <= 0.06


def test_few_seeds_of_a_noisy_task_borrow_nothing_from_the_many_of_another() -> None:
    values, noise = repeat([(0.0, 0.9, 0.0), (0.0, 0.3, 0.0)], [3, 5], arms=6)
    assert (np.abs(values) > half_width(0.05 / 6, **noise)).any(axis=0).mean() <= 0.06


@pytest.mark.parametrize("comparisons", [1, 6])
@pytest.mark.parametrize("task", [(0.0, 0.5, 0.0), (0.1, 0.5, 0.0), (0.3, 0.3, 0.0), (0.5, 0.1, 0.1)])
def test_the_detectable_difference_is_found_in_four_of_five_repetitions(task: Task, comparisons: int) -> None:
    rows, seed, own = task
    true = Noise(rows**2, (seed**2 + own**2) / 3, own**2 / 3, 2)
    values, noise = repeat([task], 3)
    found = np.abs(values + true.detectable(comparisons)) > half_width(0.05 / comparisons, **noise)
    assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_a_p_value_is_the_level_whose_interval_ends_at_zero() -> None:
    noise = Noise(0.03, 0.02, 0.01, 2)
    assert [6 * noise.p(side * noise.half_width(6)) for side in (1, -1)] == pytest.approx([0.05, 0.05])
    assert noise.p(0.0) == 1.0
    assert noise.p(1e9) < 1e-9
