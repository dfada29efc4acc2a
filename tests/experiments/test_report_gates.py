"""Gates and health: which tasks can be compared, and why the others cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases
from test_experiments_report import context

from experiments.report import gates
from experiments.report.evidence import Evidence, load_evidence
from experiments.report.gates import Health, check_task, comparable_tasks
from experiments.report.plans import read_plan
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches
from sparsegrad.files import read_json, write_json


def load(cases: Cases) -> Evidence:
    return load_evidence(context(cases.results))


def health(cases: Cases, task: str = "sst2", folder: str = "evidence_paper") -> Health:
    return check_task(load(cases), folder, task, Searches(cases.results))


def test_a_healthy_task_is_comparable(cases: Cases) -> None:
    cases.healthy()
    found = health(cases)
    assert found.is_comparable, found.reasons
    assert found.verdict == "ok"
    assert found.reached == pytest.approx(85, abs=0.5)
    assert (found.improving, found.missing) == ((0, 9), ())
    assert comparable_tasks(load(cases), "evidence_paper", Searches(cases.results)) == ["sst2", "mrpc"]


def test_a_gate_that_is_not_reached_names_both_figures(cases: Cases) -> None:
    cases.healthy()
    cases.plan(rules={"gates": {"sst2": 90, "mrpc": 60}})
    for path in sorted((cases.results / "runs" / "evidence_paper").glob("*.json")):
        replan(path, cases)
    assert health(cases).verdict == "not comparable: full fine-tuning reached 85.00 of 90 on sst2"
    assert health(cases, "mrpc").is_comparable


def replan(path: Path, cases: Cases) -> None:
    """Make a record one of the plan as it is now."""
    record = json.loads(path.read_text())
    plan = read_plan(record["plan"]["experiment"], cases.conf)
    assert plan is not None
    record["plan"]["sha256"] = plan.sha256
    path.write_text(json.dumps(record))


def test_a_gate_without_reference_runs_or_without_a_value_is_not_passed(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        (cases.results / "runs" / "evidence_paper" / f"full-sst2-{seed}.json").unlink()
    assert "full fine-tuning has no runs on sst2" in health(cases).verdict
    cases.plan(rules={"gates": {"sst2": 60}})
    for path in sorted((cases.results / "runs" / "evidence_paper").glob("*.json")):
        replan(path, cases)
    assert "no gate for mrpc" in health(cases, "mrpc").verdict


def test_a_block_without_full_fine_tuning_uses_that_of_another(cases: Cases) -> None:
    cases.healthy()
    grid = {"task": "sst2", "seed": "42,3705,2023", "method": "lora_tuned,sparsegrad"}
    cases.plan("evidence_mlp_only", {"gate_experiment": "evidence_paper"}, grid=grid)
    for seed in SEEDS:
        cases.run("lora_tuned", "sst2", seed, 0.7, folder="evidence_mlp_only")
    cases.run("full", "sst2", 42, 0.55, folder="evidence_mlp_only")  # `METHODS=full`: it trains less than the gate's
    found = health(cases, folder="evidence_mlp_only")
    assert found.reached == pytest.approx(85, abs=0.5)
    assert found.is_comparable
    assert found.missing == ("sparsegrad: all",)


def test_the_block_of_gates_counts_its_best_rate(cases: Cases) -> None:
    grid = {"task": "sst2", "seed": "42", "method": "full", "train.lr": "1e-5,1e-4"}
    cases.plan("evidence_gates", {"min_seeds": 1, "seeds": [42]}, grid=grid)
    for rate, accuracy in ((1e-5, 0.55), (1e-4, 0.7)):  # the worse one has not learned: that is no fault of the model
        one_class = accuracy < 0.6
        path = cases.run("full", "sst2", 42, accuracy, folder="evidence_gates", name=f"rate{rate}", constant=one_class)
        record = json.loads(path.read_text())
        record["config"]["train"]["lr"] = rate
        path.write_text(json.dumps(record))
    block = load(cases).blocks["evidence_gates"]
    assert block.arms == ["full lr=0.0001", "full lr=1e-05"]
    found = health(cases, folder="evidence_gates")
    assert found.reached == pytest.approx(70)
    assert not any("one class" in reason for reason in found.reasons)


def test_one_seed_that_predicts_one_class_is_named(cases: Cases) -> None:
    cases.healthy()
    cases.run("sparsegrad", "sst2", 3705, 0.5, constant=True)
    assert "sparsegrad seed 3705 predicts one class for all rows of sst2" in health(cases).verdict
    assert health(cases, "mrpc").is_comparable


def test_a_floor_need_not_learn_and_is_named(cases: Cases) -> None:
    """Constant predictions and rising curves of floors stop no comparison; different data still does."""
    cases.healthy()
    cases.plan(rules={"floors": ["sparsegrad"]})
    for path in sorted((cases.results / "runs" / "evidence_paper").glob("*.json")):
        replan(path, cases)
    for seed in SEEDS:
        cases.run("sparsegrad", "sst2", seed, 0.5, constant=True, steps=((10, 0.3), (20, 0.5), (30, 0.7)))
        cases.run("sparsegrad", "mrpc", seed, 0.5, fingerprint="other")
    found = health(cases)
    assert found.is_comparable, found.reasons
    assert found.improving == (0, 6)
    assert "sparsegrad seed 42" in found.exempt[0]
    assert "3 of 3 runs of the floors still improve" in found.exempt[1]
    assert "different data" in health(cases, "mrpc").verdict


def test_runs_that_still_improve_fail_above_a_fifth(cases: Cases) -> None:
    cases.healthy()
    rising = ((10, 0.5), (20, 0.6), (30, 0.7))
    cases.run("full", "sst2", 42, 0.85, steps=rising)
    assert health(cases).improving == (1, 9)
    assert health(cases).is_comparable
    cases.run("lora_tuned", "sst2", 42, 0.8, steps=rising)
    assert "2 of 9 runs still improve at their last evaluation, more than 20 %" in health(cases).verdict


def test_a_best_score_at_the_end_of_a_plateau_is_no_improvement(cases: Cases) -> None:
    cases.healthy()
    cases.run("full", "sst2", 42, 0.85, steps=((10, 0.5), (20, 0.845), (30, 0.846), (40, 0.847), (50, 0.849)))
    assert health(cases).improving == (0, 9)


@pytest.mark.parametrize(
    ("schedule", "scores", "improves"),
    [
        ("constant", (0.5, 0.8, 0.82, 0.83, 0.84, 0.842), True),
        ("linear", (0.5, 0.8, 0.82, 0.83, 0.84, 0.842), False),
        ("linear", (0.5, 0.8, 0.82, 0.83, 0.84, 0.846), True),
        ("linear", (0.5, 0.8, 0.82, 0.83, 0.84, 0.839), False),
    ],
)
def test_a_falling_rate_raises_the_last_quarter_whatever_the_length(
    schedule: str, scores: tuple[float, ...], improves: bool
) -> None:
    best = max(range(6), key=lambda step: scores[step])
    record = {
        "config": {"train": {"schedule": schedule}},
        "result": {"metric": "accuracy", "chosen_step": best},
        "evaluations": [{"step": step, "accuracy": score} for step, score in enumerate(scores)],
    }
    run = EvidenceRun(Path("run.json"), record, "full", "sst2", 42, 80.0, {})
    assert run.still_improving is improves
    assert run.gain_at_end == pytest.approx(100 * (scores[-1] - 0.82))


def test_arms_with_different_data_are_named(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        cases.run("sparsegrad", "mrpc", seed, 0.8, fingerprint="other")
    assert health(cases, "mrpc").reasons == ("arms have different data: full, lora_tuned and sparsegrad",)


def describe_search(cases: Cases, arm: str, **about: Any) -> None:
    path = cases.results / "studies" / f"evidence-minilm-{arm}-sst2" / "summary.json"
    write_json(path, {**read_json(path), **about})


@pytest.mark.parametrize(
    ("other", "reasons"),
    [
        ({}, ()),
        (
            {"pruner": {"name": "none"}},
            ("searches differ in their pruner: full median (warmup=5), sparsegrad none",),
        ),
        ({"seed": 8}, ("searches differ in their seed: full 7, sparsegrad 8",)),
        ({"sampler": "tpe"}, ()),  # the others do not say theirs
    ],
)
def test_searches_that_were_made_otherwise_are_named(
    other: dict[str, Any], reasons: tuple[str, ...], cases: Cases
) -> None:
    cases.healthy()
    made = {"pruner": {"name": "median", "warmup": 5}, "seed": 7}
    describe_search(cases, "full", **made)
    describe_search(cases, "sparsegrad", **{**made, **other})
    assert health(cases).reasons == reasons


def test_a_search_with_a_seed_of_the_comparison_is_named(cases: Cases) -> None:
    cases.healthy()
    describe_search(cases, "full", seed=42)
    assert health(cases).reasons == ("searches have a seed of the comparison: full",)


def test_a_search_with_another_budget_is_named(cases: Cases) -> None:
    cases.healthy()
    cases.study("sparsegrad", "sst2", trials=5)
    assert health(cases).reasons == ("searches have another budget than 8 trials: sparsegrad 5",)


def test_missing_seeds_are_listed_and_do_not_stop_a_comparison(cases: Cases) -> None:
    cases.healthy()
    (cases.results / "runs" / "evidence_paper" / "sparsegrad-sst2-2023.json").unlink()
    found = health(cases)
    assert found.missing == ("sparsegrad: 2023",)
    assert found.is_comparable


def test_a_method_that_ran_with_an_option_alone_is_not_missing_without_it(cases: Cases) -> None:
    cases.plan(grid={"task": "sst2", "seed": "42,3705,2023", "method": "full,meprop"})
    plan = read_plan("evidence_paper", cases.conf)
    assert plan is not None
    block = Block("evidence_paper", plan)
    run: Any = SimpleNamespace()
    block.runs = {("meprop density=0.05", "sst2"): {42: run, 3705: run}}
    assert list(gates._missing_seeds(block, "sst2")) == ["full: all", "meprop density=0.05: 2023"]
    block.failed = {("meprop", "sst2"): {42: "it diverged"}}
    assert "meprop: 42 (failed), 2023, 3705" in list(gates._missing_seeds(block, "sst2"))
