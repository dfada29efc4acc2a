"""Evidence in progress: what has just begun, failed or got into the wrong folder must not change what is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from evidence_cases import SEEDS, Cases
from test_experiments_report import context
from test_report_claims import PAIR
from test_report_gates import health, load

from experiments.report.decisions import SUPPORTED, decide
from experiments.report.departures import find_departures
from experiments.report.plans import read_plan
from experiments.report.resampling import has_collapsed
from experiments.report.tables.base import Table
from experiments.report.tables.main_tables import block_tables
from sparsegrad.files import read_json, write_json

RECORDS = Path("runs") / "evidence_paper"


def main_table(cases: Cases) -> Table:
    return block_tables(context(cases.results), "evidence_paper")[0]


def keep_seeds(cases: Cases, task: str, arms: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Delete the runs of these arms on a task, except those of these seeds."""
    for arm in arms:
        for seed in set(SEEDS) - set(seeds):
            (cases.results / RECORDS / f"{arm}-{task}-{seed}.json").unlink()


def change(cases: Cases, name: str, **parts: Any) -> None:
    path = cases.results / RECORDS / f"{name}.json"
    record = read_json(path)
    for part, value in parts.items():
        record[part] = {**record[part], **value} if isinstance(value, dict) else value
    write_json(path, record)


def test_a_task_that_has_just_begun_leaves_the_verdict_of_the_others(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "mrpc", ("sparsegrad",), (42,))
    (found,) = decide(context(cases.results), PAIR)
    assert found.verdict == SUPPORTED
    assert "sst2, 3 seeds (not mrpc: fewer than 3 paired seeds)" in found.measured


def test_an_average_names_its_tasks_until_all_have_enough_seeds(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "mrpc", ("sparsegrad",), (42,))
    rows = main_table(cases).frame.set_index("method")
    assert rows.loc["SparseGrad exact", "average"].endswith("(3) (sst2 only)")
    difference = rows.loc["SparseGrad exact", "minus LoRA, alpha = 2 rank"]
    assert difference.endswith(" (sst2 only)")
    assert float(difference.split()[0]) == pytest.approx(6, abs=1)
    assert rows.loc["full fine-tuning", "average"].endswith("(3)")


def test_a_task_on_which_the_reference_has_begun_is_not_yet_averaged(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "mrpc", ("lora_tuned",), (42,))
    table = main_table(cases)
    rows = table.frame.set_index("method")
    assert rows.loc["SparseGrad exact", "average"] == rows.loc["SparseGrad exact", "sst2"]
    assert "Not in the averages, with fewer than 3 seeds: mrpc." in table.notes


def test_an_arm_without_runs_on_a_task_has_not_missed_its_target(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "mrpc", ("sparsegrad",), ())
    assert "not reached" not in main_table(cases).frame.set_index("method").loc["SparseGrad exact", "h to target"]


def test_a_run_of_another_plan_does_not_count_in_this_folder(cases: Cases) -> None:
    cases.healthy()
    cases.plan("evidence_mlp_only")
    keep_seeds(cases, "sst2", ("sparsegrad",), (3705, 2023))
    cases.run("sparsegrad", "sst2", 42, 0.95, experiment="evidence_mlp_only", name="other")
    block = load(cases).blocks["evidence_paper"]
    assert set(block.of("sparsegrad", "sst2")) == {3705, 2023}
    assert "evidence_paper/other.json: exploratory, made by another plan (evidence_mlp_only)" in block.apart


@pytest.mark.parametrize("is_complete", [False, True], ids=["failed", "no score"])
def test_a_planned_seed_that_diverged_voids_its_task(cases: Cases, is_complete: bool) -> None:
    cases.healthy()
    cases.plan(rules={"min_seeds": 2})
    for path in (cases.results / RECORDS).glob("*.json"):
        sha256 = read_plan("evidence_paper", cases.conf).sha256
        change(cases, path.stem, plan={"sha256": sha256})
    if is_complete:
        change(cases, "sparsegrad-sst2-42", result={"value": None})
    else:
        change(cases, "sparsegrad-sst2-42", status="failed", reason="the loss is not finite: training diverged; lower")
    found = health(cases)
    assert found.reasons == ("sparsegrad diverged with seed 42 on sst2",)
    assert found.missing == ("sparsegrad: 42 (failed)",)
    assert health(cases, "mrpc").is_comparable


def test_a_run_that_diverged_outside_the_plan_voids_nothing(cases: Cases) -> None:
    cases.healthy()
    path = cases.run("sparsegrad", "sst2", 42, 0.8, name="other")
    write_json(path, {**read_json(path), "plan": None, "status": "failed", "reason": "training diverged"})
    keep_seeds(cases, "sst2", ("sparsegrad",), (3705, 2023))
    assert health(cases).is_comparable


def test_a_run_that_failed_for_another_reason_is_only_missing(cases: Cases) -> None:
    cases.healthy()
    change(cases, "sparsegrad-sst2-42", status="failed", reason="no space left on the disk")
    found = health(cases)
    assert found.is_comparable
    assert found.missing == ("sparsegrad: 42 (failed)",)


def test_a_score_that_is_not_that_of_its_predictions_does_not_count(cases: Cases) -> None:
    cases.healthy()
    change(cases, "full-sst2-42", result={"value": 0.95})
    block = load(cases).blocks["evidence_paper"]
    assert set(block.of("full", "sst2")) == {3705, 2023}
    assert any("its score is not that of its predictions" in line for line in block.apart)


def test_without_its_summary_the_budget_of_a_search_is_that_of_the_records(cases: Cases) -> None:
    cases.healthy()
    (cases.results / "studies" / "evidence-minilm-sparsegrad-sst2" / "summary.json").unlink()
    change(cases, "sparsegrad-sst2-42", hparams={"budget": 8})
    assert health(cases).is_comparable
    change(cases, "sparsegrad-sst2-42", hparams={"budget": 3})
    assert health(cases).reasons == ("searches have another budget than 8 trials: sparsegrad 3",)


def test_predictions_that_are_not_finite_have_collapsed() -> None:
    label = np.array([0.0, 1.0, 2.0])
    assert has_collapsed("pearson", {"predicted": np.array([0.0, np.nan, 2.0]), "label": label})
    assert has_collapsed("nll", {"nll": np.array([1.0, np.inf]), "tokens": np.array([1, 1])})
    assert not has_collapsed("nll", {"nll": np.array([1.0, 2.0]), "tokens": np.array([1, 1])})


@pytest.mark.parametrize(
    ("group", "other", "said"),
    [
        ("model", {"lora_rank": 64}, ["model.lora_rank=64"]),
        ("model", {"usual": {"density": 0.05}}, ["model.usual.density=0.05"]),
        ("model", {"blocks": "0::1"}, ["model.blocks=0::1"]),
        ("model", {"source": "elsewhere", "revision": None, "keep_head": False}, []),
        ("model", {"dense": ["output"]}, ["model.dense=['output']"]),
        ("task", {"mask_prompt": True}, ["task.mask_prompt=True"]),
    ],
)
def test_a_setting_of_the_model_or_the_task_that_is_not_planned_is_a_departure(
    cases: Cases, group: str, other: dict[str, Any], said: list[str]
) -> None:
    """Methods take defaults from the model, so the options of the method alone do not show these."""
    cases.healthy()
    settings = {
        "model": {"name": "minilm", "source": "asset:minilm", "lora_rank": 3, "blocks": None},
        "task": {"name": "sst2", "mask_prompt": False},
    }
    for one, content in settings.items():
        path = cases.conf / one / f"{content['name']}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    record = json.loads((cases.results / RECORDS / "sparsegrad-sst2-42.json").read_text())
    record["config"] |= settings
    plan = read_plan("evidence_paper", cases.conf)
    assert plan is not None
    assert find_departures(record, plan) == []
    record["config"][group] = {**settings[group], **other}
    assert find_departures(record, plan) == said
