"""Metrics: right numbers for every kind of task, without a hub, a writable package or a shared working folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from sparsegrad.errors import UserError
from sparsegrad.metrics import METRIC_FOLDER, compute_metrics, metric_config
from sparsegrad.metrics.text_classification.text_classification import CONFIGS
from sparsegrad.tasks import Task


def task(main_metric: str = "accuracy", labels: int = 2, metric: str = "") -> Task:
    names = tuple(f"l{i}" for i in range(labels))
    return Task(name="t", columns=("a",), labels=names, main_metric=main_metric, eval_base=1, metric=metric)


def score(of: Task, logits: list[list[float]], labels: list[float]) -> dict[str, float]:
    return compute_metrics(of)(EvalPrediction(predictions=np.array(logits, np.float32), label_ids=np.array(labels)))


LOGITS = [[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.5]]  # predicts 0 1 1 0


def test_scores_need_no_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/nowhere")
    assert score(task(), LOGITS, [0, 1, 0, 0]) == {"accuracy": 0.75}


def test_accuracy_and_f1() -> None:
    assert score(task(), LOGITS, [0, 1, 0, 0]) == {"accuracy": 0.75}
    assert score(task(metric="accuracy_f1"), LOGITS, [0, 1, 0, 0]) == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})
    assert score(task(metric="accuracy_f1"), [[1.0, 0.0]] * 2, [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_accuracy_of_three_labels() -> None:
    assert score(task(labels=3), [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [2, 1]) == {"accuracy": 0.5}


def test_matthews_by_its_formula() -> None:
    # true positive 1, true negative 2, false positive 1, false negative 0
    expected = (1 * 2 - 1 * 0) / np.sqrt((1 + 1) * (1 + 0) * (2 + 1) * (2 + 0))
    cola = task("matthews_correlation")
    assert score(cola, LOGITS, [0, 1, 0, 0]) == {"matthews_correlation": pytest.approx(expected)}
    assert score(cola, [[1.0, 0.0]] * 4, [0, 1, 0, 0]) == {"matthews_correlation": 0.0}


def test_regression_has_both_correlations() -> None:
    found = score(task("pearson", 0), [[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0])
    assert found == pytest.approx({"pearson": np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1], "spearman": 1.0})


@pytest.mark.parametrize(("logits", "labels"), [([[2.5]] * 3, [1.0, 2.0, 3.0]), ([[1.0], [2.0], [3.0]], [2.0] * 3)])
def test_a_constant_counts_as_zero_with_a_warning(logits: list[list[float]], labels: list[float]) -> None:
    with pytest.warns(RuntimeWarning, match="are equal: correlation counted as 0"):
        assert score(task("pearson", 0), logits, labels) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("labels", [0, 2])
def test_nan_predictions_are_the_users_error(bad: float, labels: int) -> None:
    of = task("pearson", 0) if not labels else task()
    with pytest.raises(UserError, match="predicts NaN or infinity for 1 of 2 rows"):
        score(of, [[bad] * of.num_labels, [1.0] * of.num_labels], [0, 1])


def test_logits_may_come_with_hidden_states_and_labels_as_columns() -> None:
    prediction = EvalPrediction(
        predictions=(np.array(LOGITS), np.zeros((4, 9))), label_ids=np.array([[0], [1], [0], [0]])
    )
    assert compute_metrics(task())(prediction) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    ("main_metric", "labels", "metric"),
    [("bleu", 2, ""), ("accuracy", 0, ""), ("pearson", 2, ""), ("f1", 2, "accuracy"), ("accuracy", 2, "glue")],
)
def test_a_metric_that_does_not_fit_the_task_is_named(main_metric: str, labels: int, metric: str) -> None:
    with pytest.raises(UserError, match=f"task.main_metric={main_metric}"):
        metric_config(task(main_metric, labels, metric))


def test_every_main_metric_has_a_configuration() -> None:
    assert metric_config(task("f1")) == "accuracy_f1"
    with pytest.raises(UserError, match=r"F1 needs two labels, and .* has 3"):
        metric_config(task("f1", 3))
    assert metric_config(task("spearman", 0)) == "pearson"


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluate_loads_the_folder(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = evaluate.load(str(METRIC_FOLDER), config, keep_in_memory=True, cache_dir=str(tmp_path))
    assert set(metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])) == set(CONFIGS[config])


def test_an_unknown_configuration_lists_the_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    with pytest.raises(ValueError, match="choose one of accuracy, accuracy_f1"):
        evaluate.load(str(METRIC_FOLDER), "bleu", cache_dir=str(tmp_path))


# Two processes, which share the imports.
PROGRAM = """
import os
import numpy as np
from transformers import EvalPrediction
from sparsegrad.metrics import compute_metrics
from sparsegrad.tasks import Task
task = Task(name="t", columns=("a",), labels=("x", "y"), main_metric="accuracy", eval_base=1)
other = os.fork()
for right in range(0, 101, 10):
    logits = np.zeros((100, 2)); logits[:right, 1] = 1
    found = compute_metrics(task)(EvalPrediction(predictions=logits, label_ids=np.ones(100, int)))
    assert found == {"accuracy": right / 100}, found
assert not other or os.waitpid(other, 0)[1] == 0
"""


def test_processes_at_once_from_a_read_only_package(tmp_path: Path) -> None:
    source, work = tmp_path / "package", tmp_path / "work"
    shutil.copytree(METRIC_FOLDER.parents[1], source / "sparsegrad", ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    for path in source.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-B", "-c", PROGRAM]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []
    for path in source.rglob("*"):
        path.chmod(0o755)


def test_ordinary_scores_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(task("pearson", 0), [[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0])["spearman"] == pytest.approx(1)
        assert set(score(task(metric="accuracy_f1"), LOGITS, [0, 1, 0, 0])) == {"accuracy", "f1"}
