"""Statistics of the report: a simulation with known effects, cases by hand, and what pairing gains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as reference
from scipy.stats import norm
from sklearn.metrics import matthews_corrcoef

from experiments.paths import ROOT
from experiments.report import resampling, stats
from experiments.report.intervals import split
from experiments.report.resampling import score_draws, scores
from sparsegrad.errors import UserError
from sparsegrad.files import read_json
from sparsegrad.runs.predictions import Arrays, read_predictions

ROWS = 400
Arm = dict[str, dict[int, Arrays]]
Pair = tuple[Arm, Arm]


def classified(generator: np.random.Generator, centres: tuple[float, float], seeds: int, spread: float) -> Pair:
    """Two arms that answer row i right if a latent number is below their centre.

    Rows have a difficulty that both arms share and one for each arm; seeds shift the centre by `spread`. The expected
    accuracy is the normal distribution at centre / sqrt(1 + spread^2).
    """
    shared, label = generator.standard_normal(ROWS), generator.integers(0, 2, ROWS).astype(np.uint8)
    arms: list[Arm] = []
    for centre in centres:
        own, arm = 0.5 * generator.standard_normal(ROWS), {}
        for seed in range(seeds):
            latent = 0.5 * shared + own + np.sqrt(0.5) * generator.standard_normal(ROWS)
            right = latent < centre + spread * generator.standard_normal()
            arm[seed] = {"predicted": np.where(right, label, 1 - label).astype(np.uint8), "label": label}
        arms.append({"task": arm})
    return arms[0], arms[1]


def graded(generator: np.random.Generator, noises: tuple[float, float], seeds: int, spread: float) -> Pair:
    """Two arms whose predictions are the label plus noise; seeds vary its logarithm by `spread`."""
    label = generator.standard_normal(ROWS)
    arms: list[Arm] = []
    for noise in noises:
        own, arm = generator.standard_normal(ROWS), {}
        for seed in range(seeds):
            error = (own + generator.standard_normal(ROWS)) / np.sqrt(2)
            scale = noise * np.exp(spread * generator.standard_normal())
            arm[seed] = {"predicted": (label + scale * error).astype(np.float16), "label": label.astype(np.float16)}
        arms.append({"task": arm})
    return arms[0], arms[1]


def accuracy_of(centre: float, spread: float) -> float:
    return 100 * float(norm.cdf(centre / np.sqrt(1 + spread**2)))


def pearson_of(noise: float, spread: float) -> float:
    """Expected correlation 1 / sqrt(1 + scale^2) over the log-normal scale, by quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(21)
    values = 1 / np.sqrt(1 + (noise * np.exp(spread * points)) ** 2)
    return 100 * float(np.average(values, weights=weights))


@pytest.mark.parametrize(
    ("metric", "make", "truth", "arms", "seeds", "spread"),
    [
        ("accuracy", classified, accuracy_of, (1.0, 0.8), 3, 0.1),
        ("accuracy", classified, accuracy_of, (1.0, 0.8), 5, 0.06),
        ("accuracy", classified, accuracy_of, (1.0, 1.0), 3, 0.1),
        ("pearson", graded, pearson_of, (0.5, 0.6), 3, 0.05),
        ("pearson", graded, pearson_of, (0.5, 0.5), 5, 0.05),
    ],
)
def test_intervals_cover_the_true_difference(
    metric: str, make: Callable[..., Pair], truth: Callable[[float, float], float], arms: tuple[float, float],
    seeds: int, spread: float,
) -> None:  # fmt: skip
    """Coverage at least 93 %, and not much more than 95 %; equal arms differ in at most 6 % of repetitions."""
    generator, repetitions = np.random.default_rng(7), 1000
    expected = truth(arms[0], spread) - truth(arms[1], spread)
    covered = found = 0
    for _ in range(repetitions):
        result = stats.compare({"task": metric}, *make(generator, arms, seeds, spread), draws=200)
        assert result is not None
        assert result.interval is not None
        covered += result.interval[0] <= expected <= result.interval[1]
        found += not result.interval[0] <= 0 <= result.interval[1]
    assert 0.93 <= covered / repetitions <= (0.985 if seeds == 3 else 0.975)
    if expected == 0:
        assert found / repetitions <= 0.06


def test_an_average_over_tasks_covers_and_is_narrower_than_one_task() -> None:
    generator, repetitions, spread = np.random.default_rng(3), 500, 0.1
    expected = accuracy_of(1.0, spread) - accuracy_of(0.9, spread)
    covered, widths = 0, []
    for _ in range(repetitions):
        pairs = [classified(generator, (1.0, 0.9), 3, spread) for _ in range(4)]
        a, b = ({str(n): pair[side]["task"] for n, pair in enumerate(pairs)} for side in (0, 1))
        whole = stats.compare(dict.fromkeys(a, "accuracy"), a, b, draws=100)
        one = stats.compare({"0": "accuracy"}, a, b, draws=100)
        assert whole is not None
        assert whole.interval is not None
        assert one is not None
        assert one.interval is not None
        covered += whole.interval[0] <= expected <= whole.interval[1]
        widths.append((whole.interval[1] - whole.interval[0]) / (one.interval[1] - one.interval[0]))
    assert 0.93 <= covered / repetitions <= 0.985
    assert float(np.median(widths)) < 0.5


def run(predicted: list[float], label: list[float], kind: type = np.uint8) -> Arrays:
    return {"predicted": np.array(predicted, kind), "label": np.array(label, kind)}


def test_scores_by_hand() -> None:
    assert scores("accuracy", [run([1, 1, 0, 0], [1, 0, 0, 0])])[0] == pytest.approx(75.0)
    label, predicted = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]
    assert scores("matthews_correlation", [run(predicted, label)])[0] == pytest.approx(100 / 3)
    assert scores("pearson", [run([1, 2, 3], [2, 4, 6], np.float16)])[0] == pytest.approx(100)
    language = {"nll": np.array([2.0, 6.0], np.float32), "tokens": np.array([1, 3], np.uint32)}
    assert scores("nll", [language])[0] == pytest.approx(2.0)


def test_constant_predictions_score_zero_and_are_seen() -> None:
    constant = run([1, 1, 1], [1, 0, 1])
    assert scores("matthews_correlation", [constant])[0] == 0
    assert scores("pearson", [run([1, 1, 1], [1, 0, 2], np.float16)])[0] == 0
    assert resampling.has_collapsed("accuracy", constant)
    assert not resampling.has_collapsed("accuracy", run([1, 0, 1], [1, 0, 1]))


@pytest.mark.parametrize(
    ("spread", "ordered", "collapsed"),
    [(0.0, False, True), (0.2, False, True), (0.3, False, False), (0.2, True, False), (1.0, True, False)],
)
def test_a_regression_whose_numbers_hardly_differ_has_collapsed(spread: float, ordered: bool, collapsed: bool) -> None:
    label = np.linspace(0, 5, 100)
    numbers = label if ordered else np.random.default_rng(0).permutation(label)
    found = run(list(2.5 + spread * (numbers - 2.5)), list(label), np.float16)
    assert resampling.has_collapsed("pearson", found) is collapsed


def test_committed_runs_that_learned_nothing_have_collapsed() -> None:
    seen = set()
    for path in sorted((ROOT / "results" / "runs" / "evidence_gates").glob("*.json")):
        record = read_json(path)
        if record["config"]["task"]["name"] == "stsb":
            arrays = read_predictions(path, record)
            has_learned = record["result"]["value"] > 0.5
            assert resampling.has_collapsed("pearson", arrays) is not has_learned
            seen.add(has_learned)
    assert seen == {True, False}


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation", "pearson", "nll"])
def test_draws_are_the_metric_on_the_drawn_rows(metric: str) -> None:
    generator = np.random.default_rng(0)
    if metric == "nll":
        arrays = {"nll": generator.random(30).astype(np.float32), "tokens": generator.integers(1, 9, 30)}
    else:
        arrays = run(list(generator.integers(0, 2, 30)), list(generator.integers(0, 2, 30)))
    drawn, counts = score_draws(metric, [arrays], 20), resampling.row_counts(30, 20)
    for line in range(20):
        rows = np.repeat(np.arange(30), counts[line])
        sample = {name: values[rows] for name, values in arrays.items()}
        assert drawn[line, 0] == pytest.approx(scores(metric, [sample])[0])
        if metric == "matthews_correlation":
            assert drawn[line, 0] == pytest.approx(100 * matthews_corrcoef(sample["label"], sample["predicted"]))


def test_remembered_draws_are_the_same_draws() -> None:
    a, b = classified(np.random.default_rng(1), (1.0, 0.8), 2, 0.0)
    plain = [a["task"][0], a["task"][1], b["task"][0]]
    kept = [resampling.Remembered(one) for one in plain]
    expected = score_draws("accuracy", plain, 50)
    for order in ([0], [1, 0], [2, 1, 0]):  # some are new, some are known
        found = score_draws("accuracy", [kept[one] for one in order], 50)
        assert (found == expected[:, order]).all()


def test_the_rows_part_is_the_error_of_scipys_bootstrap() -> None:
    a, b = classified(np.random.default_rng(1), (1.0, 0.8), 1, 0.0)
    runs = [a["task"][0], b["task"][0]]
    drawn = score_draws("accuracy", runs, 4000)
    right = [(one["predicted"] == one["label"]).astype(float) for one in runs]
    theirs = reference.bootstrap(
        right, lambda x, y, axis: 100 * (x.mean(axis) - y.mean(axis)), paired=True, n_resamples=4000, vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert float(np.std(drawn[:, 0] - drawn[:, 1])) == pytest.approx(float(theirs.standard_error), rel=0.05)


def test_seeds_alone_give_the_t_interval() -> None:
    """Rows that all draws weigh alike: the interval is that of a paired t-test over seeds."""
    a, b = np.array([80.0, 82.0, 84.0]), np.array([79.0, 80.0, 84.0])
    differences = a - b
    noise = split(differences, np.tile(differences, (50, 1)))
    assert noise.seeds == pytest.approx(np.var(differences, ddof=1) / 3)
    assert (noise.rows, noise.least, noise.df) == (0, 0, 2)
    found = stats.Difference(float(differences.mean()), noise, 3, 0, ("task",))
    theirs = reference.ttest_rel(a, b)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    smallest = found.detectable(6)
    assert smallest is not None
    power = reference.nct.sf(reference.t.isf(0.025 / 6, 2), 2, smallest / noise.se)
    assert power == pytest.approx(0.8, abs=0.001)


def test_pairing_narrows_the_interval() -> None:
    """Rows that are hard for both arms cancel: against an arm on other rows of the same kind they do not."""
    generator = np.random.default_rng(2)
    shared, label = generator.standard_normal(ROWS), generator.integers(0, 2, ROWS).astype(np.uint8)

    def arm(difficulty: np.ndarray, centre: float) -> dict[int, Arrays]:
        latent = [0.95 * difficulty + 0.3 * generator.standard_normal(ROWS) for _ in range(5)]
        return {
            seed: {"predicted": np.where(one < centre, label, 1 - label).astype(np.uint8), "label": label}
            for seed, one in enumerate(latent)
        }

    first, same, other = (
        {"t": arm(difficulty, centre)}
        for difficulty, centre in ((shared, 1.0), (shared, 0.9), (generator.permutation(shared), 0.9))
    )
    paired, unpaired = (stats.compare({"t": "accuracy"}, first, second, draws=500) for second in (same, other))
    assert paired is not None
    assert unpaired is not None
    assert paired.noise is not None
    assert unpaired.noise is not None
    assert paired.noise.se < 0.6 * unpaired.noise.se


def test_seeds_of_one_arm_are_left_out_and_counted() -> None:
    a, b = classified(np.random.default_rng(4), (1.0, 0.5), 5, 0.0)
    del b["task"][4]
    found = stats.compare({"task": "accuracy"}, a, b, draws=50)
    assert found is not None
    assert (found.seeds, found.left_out) == (4, 1)
    for seed in (2, 3):
        del b["task"][seed]
    few = stats.compare({"task": "accuracy"}, a, b, draws=50)
    assert few is not None
    assert (few.seeds, few.left_out, few.interval, few.p, few.detectable()) == (2, 3, None, None, None)
    assert stats.compare({"task": "accuracy"}, a, {"task": {}}, draws=50) is None
    assert stats.compare({"task": "accuracy", "more": "accuracy"}, a, b, draws=50) is None, "a task without runs"


def test_equal_arms_differ_by_nothing_without_an_interval() -> None:
    a, _ = classified(np.random.default_rng(4), (1.0, 0.5), 3, 0.0)
    found = stats.compare({"task": "accuracy"}, a, a, draws=50)
    assert found is not None
    assert (found.value, found.interval) == (0.0, None)


def test_runs_on_other_rows_are_refused() -> None:
    with pytest.raises(UserError, match="different validation rows"):
        scores("accuracy", [run([1], [1]), run([1], [0])])
    with pytest.raises(UserError, match=r"metric=bleu .*accuracy"):
        scores("bleu", [run([1], [1])])


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_the_interquartile_mean_by_hand() -> None:
    assert stats.interquartile_mean([1.0, 2.0, 3.0, 100.0]) == pytest.approx(2.5)
    assert stats.interquartile_mean([0.0, 1.0, 8.0]) == pytest.approx((0.25 * 0 + 1 + 0.25 * 8) / 1.5)
    assert stats.interquartile_mean([]) is None
