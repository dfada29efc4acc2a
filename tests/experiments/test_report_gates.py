"""Plans, gates and health: what counts as evidence, and why the rest does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from evidence_cases import SEEDS, Cases
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_experiments_report import context

from experiments.paths import CONF
from experiments.report.arms import arm_of
from experiments.report.departures import find_departures
from experiments.report.evidence import BLOCKS, Evidence, load_evidence
from experiments.report.gates import Health, check_task, comparable_tasks
from experiments.report.plans import read_plan
from experiments.report.searches import Searches
from sparsegrad.errors import UserError


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
    found = health(cases, folder="evidence_mlp_only")
    assert found.reached == pytest.approx(85, abs=0.5)
    assert found.is_comparable
    assert found.missing == ()


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


def test_arms_with_different_data_are_named(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        cases.run("sparsegrad", "mrpc", seed, 0.8, fingerprint="other")
    assert health(cases, "mrpc").reasons == ("arms have different data: full, lora_tuned and sparsegrad",)


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


def test_a_plan_edited_after_its_runs_leaves_them_exploratory(cases: Cases) -> None:
    cases.healthy()
    cases.plan(rules={"gates": {"sst2": 50, "mrpc": 60}})
    cases.run("sparsegrad", "sst2", 42, 0.86)
    block = load(cases).blocks["evidence_paper"]
    assert len(list(block.all_runs())) == 1, "the run of the plan as it is now"
    assert len(block.apart) == 17
    assert all("its plan evidence_paper was edited afterwards" in line for line in block.apart)


@pytest.mark.parametrize(
    ("plan", "why"),
    [(None, "made without a plan"), ({"experiment": "gone", "sha256": "0"}, "its plan gone no longer exists")],
)
def test_a_record_without_its_plan_is_exploratory(cases: Cases, plan: Any, why: str) -> None:
    cases.plan()
    cases.run("full", "sst2", 42, 0.9, plan=plan)
    block = load(cases).blocks["evidence_paper"]
    assert not block.runs
    assert why in block.apart[0]


def test_a_record_that_departs_from_its_plan_is_exploratory(cases: Cases) -> None:
    protocol = {"epochs": "${evidence.epochs.${task.name}}"}
    rules = {"epochs": {"sst2": 3}}
    cases.plan(rules=rules, hparams="search", train={"batch_size": 16, "lr": 1e-3}, protocol=protocol)
    cases.run("full", "sst2", 42, 0.9)
    cases.run("lora", "sst2", 5, 0.9)
    found = load(cases).blocks["evidence_paper"].apart
    said = "train.batch_size=32, protocol.epochs=None, "
    assert found[0].endswith(f"not as its plan evidence_paper says: {said}train.lr=0.0001 by hand")
    assert found[1].endswith(f"{said}seed=5, method=lora, train.lr=0.0001 by hand")


def test_a_record_of_the_search_and_the_protocol_follows_its_plan(cases: Cases) -> None:
    cases.plan(hparams="search", train={"batch_size": 32})
    cases.run("full", "sst2", 42, 0.9, hparams={"from": "search", "train.lr": 1e-4, "study": "s"})
    assert load(cases).blocks["evidence_paper"].apart == []


def test_predictions_of_another_record_are_left_out(cases: Cases) -> None:
    cases.healthy()
    path = cases.results / "runs" / "evidence_paper" / "full-sst2-42.npz"
    path.write_bytes((path.parent / "full-sst2-3705.npz").read_bytes())
    block = load(cases).blocks["evidence_paper"]
    assert sorted(block.of("full", "sst2")) == [2023, 3705]
    assert "does not belong to full-sst2-42.json" in block.apart[0]


def test_two_records_of_one_seed_contradict_each_other(cases: Cases) -> None:
    cases.healthy()
    for name in ("a", "b"):
        cases.run("full", "sst2", 42, 0.9, name=name)
    block = load(cases).blocks["evidence_paper"]
    assert sorted(block.of("full", "sst2")) == [2023, 3705]
    assert [line for line in block.apart if "two records" in line] == [
        "full sst2 seed 42: two records (a.json, b.json): delete the wrong one"
    ]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"budget": 0}, r"budget=0 .*at least 1"),
        ({"gates": {"sst2": "high"}}, r"gates\.sst2=high"),
        ({"regime": "all"}, r"regime=all .*mlp_only"),
        ({"max_improving": 2}, r"max_improving=2"),
        ({"seeds": "42"}, r"seeds=42 .*list of integers"),
        ({"budjet": 3}, r"budjet .*budget"),
        ({"floors": "full"}, r"floors=full .*list of methods"),
        ({"floors": ["magic"]}, r"floors=magic .*full, lora_tuned"),
        ({"floors": ["lora_tuned"]}, r"floors=lora_tuned .*reference"),
        ({"share": 0}, r"share=0 "),
    ],
)
def test_a_rule_that_is_not_allowed_is_one_error(cases: Cases, rules: dict[str, Any], said: str) -> None:
    cases.plan(rules=rules)
    with pytest.raises(UserError, match=said):
        load(cases)


def test_the_plans_of_the_repository_are_readable() -> None:
    found = {name: read_plan(name) for name in BLOCKS}
    for name, plan in found.items():
        if plan is not None:
            assert plan.folder == name
            assert plan.planned > 0
            assert plan.gates or name == "evidence_smollm2"
    assert read_plan("no_such_plan") is None


def test_a_plan_keeps_the_choices_of_the_plan_below_it(cases: Cases) -> None:
    """Otherwise what a protocol or a model says would not be checked in runs of a plan with a parent."""
    folder = cases.conf / "experiment"
    shutil.copytree(CONF / "protocol", cases.conf / "protocol")
    shutil.copytree(CONF / "model", cases.conf / "model")
    cases.plan("parent", defaults=[{"override /protocol": "both"}, {"override /model": "minilm"}])
    (folder / "child.yaml").write_text("defaults: [parent, {override /model: smollm2}, _self_]\nname: child\n")
    plan = read_plan("child", cases.conf)
    assert plan is not None
    record = json.loads(cases.run("full", "sst2", 42, 0.9, experiment="parent").read_text())
    record["config"]["protocol"] |= {"select": "validation", "watch_validation": True, "max_steps": None}
    found = find_departures(record, plan)
    assert "protocol.select=validation" in found
    assert "model.name=minilm" in found
    assert not any("defaults" in one or "watch_validation" in one for one in found)


@pytest.mark.parametrize("name", [*BLOCKS, "compare", "compare_smollm2"])
def test_a_run_of_a_plan_follows_it(name: str) -> None:
    plan = read_plan(name)
    assert plan is not None
    others = {key: values[-1] for key, values in plan.grid.items() if key != "seed"}
    overrides = [f"experiment={name}", f"seed={plan.seeds[0]}", *(f"{key}={value}" for key, value in others.items())]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides)
    config: Any = OmegaConf.to_container(composed, resolve=True)
    record = {"config": config, "hparams": {"from": "search", "train.lr": 1e-4}}
    assert find_departures(record, plan) == []
    config["protocol"]["max_steps"] = 4
    assert find_departures(record, plan) == ["protocol.max_steps=4"]
    config["model"]["name"] = "another"
    assert find_departures(record, plan) == ["protocol.max_steps=4", "model.name=another"]


def test_an_arm_is_named_by_what_differs_from_its_yaml() -> None:
    authors = yaml.safe_load((CONF / "method" / "sparsegrad_authors.yaml").read_text())
    config = {"model": {"name": "minilm", "authors_keep": 7019}, "method": {**authors, "keep": 7019}, "seed": 1}
    assert arm_of(config) == "sparsegrad_authors"
    config["method"] = {**config["method"], "transposed_in_basis": False}  # type: ignore[dict-item]
    assert arm_of(config) == "sparsegrad_authors transposed_in_basis=false"
    sparse = {"name": "sparsegrad", "density": 0.05, "keep": None, "engine": "merged", "basis": None, "sides": "small"}
    assert arm_of({"model": {}, "method": sparse}) == "sparsegrad density=0.05 sides=small"
    assert arm_of({"model": {"usual": {"density": 0.05}}, "method": {**sparse, "sides": "both"}}) == "sparsegrad"
    assert arm_of({"model": {}, "method": {"name": "new_method", "depth": 3}}) == "new_method"


@pytest.mark.parametrize(
    ("option", "model"),
    [("peft/dora", "smollm2"), ("peft/shira", "minilm"), ("peft", "minilm"), ("lora_xs", "smollm2")],
)
def test_an_arm_of_any_option_is_its_name_until_something_is_changed(option: str, model: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [f"method={option}", f"model={model}"])
    config: Any = OmegaConf.to_container(composed, resolve=True)
    assert arm_of(config) == option.rpartition("/")[2]
    if "config" in config["method"]:
        config["method"] |= {"budget": "density:0.05", "config": {**config["method"]["config"], "layers": 3}}
        assert arm_of(config) == f"{option.rpartition('/')[2]} budget=density:0.05 config.layers=3"
