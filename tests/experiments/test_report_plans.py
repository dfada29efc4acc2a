"""Plans: which records follow theirs and count, which are exploratory, and how arms are named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from itertools import product
from typing import Any

import pytest
import yaml
from evidence_cases import SEEDS, Cases
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_report_gates import load, replan

from experiments.paths import CONF
from experiments.report import arms
from experiments.report.arms import arm_of
from experiments.report.blocks import BLOCKS
from experiments.report.departures import find_departures
from experiments.report.plans import load_node, read_plan
from sparsegrad.errors import UserError


def test_a_plan_edited_after_its_runs_leaves_them_exploratory(cases: Cases) -> None:
    cases.healthy()
    cases.plan(rules={"gates": {"sst2": 50, "mrpc": 60}})
    cases.run("sparsegrad", "sst2", 42, 0.86)
    block = load(cases).blocks["evidence_paper"]
    assert len(list(block.all_runs())) == 1, "the run of the plan as it is now"
    assert len(block.apart) == 17
    assert all("its plan evidence_paper was edited afterwards" in line for line in block.apart)


def test_the_runs_of_a_plan_that_says_so_are_exploratory(cases: Cases) -> None:
    cases.plan(rules={"exploratory": True})
    cases.run("full", "sst2", 42, 0.9)
    block = load(cases).blocks["evidence_paper"]
    assert not block.runs
    assert "exploratory, its plan evidence_paper says so" in block.apart[0]


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


@pytest.mark.parametrize("damage", ["empty", "cut", "no archive"])
def test_damaged_predictions_leave_their_record_out(cases: Cases, damage: str) -> None:
    cases.plan()
    path = cases.run("full", "sst2", 42, 0.9).with_suffix(".npz")
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[: len(content) // 2], "no archive": b"PK\x03\x04" + bytes(20)}[damage]
    )
    block = load(cases).blocks["evidence_paper"]
    assert not block.runs
    assert "full-sst2-42.npz cannot be read" in block.apart[0]
    assert block.apart[0].endswith(": make evidence BLOCK=2a DATA=<glue folder> makes it again")


def test_two_records_of_one_seed_contradict_each_other(cases: Cases) -> None:
    cases.healthy()
    about = {"from": "search", "study": "gone", "train.lr": 1e-4}
    for name in ("a", "b"):
        cases.run("full", "sst2", 42, 0.9, name=name, hparams=about)
    block = load(cases).blocks["evidence_paper"]
    assert sorted(block.of("full", "sst2")) == [2023, 3705]
    names = "; ".join(f"{name}.json, rate 0.0001, 2026-01-01" for name in ("a", "b", "full-sst2-42"))
    assert block.apart == [f"full sst2 seed 42: 3 records ({names}): delete the wrong ones"]


@pytest.mark.parametrize(
    ("of_run", "change"),
    [({"train.lr": 3e-4}, "rate 0.0003, now 0.0001"), ({"ratio_to_full": 2.0}, "2 times .* now 1")],
)
def test_runs_of_an_earlier_search_are_apart_from_those_of_the_present_one(
    cases: Cases, of_run: dict[str, float], change: str
) -> None:
    """A search that is made anew changes the rate, so that the same cells run again under other keys."""
    cases.healthy()
    study = {"from": "search", "study": "evidence-minilm-sparsegrad-sst2"}
    for seed in SEEDS[:2]:
        now = {key: 1.0 if key == "ratio_to_full" else 1e-4 for key in of_run}
        cases.run("sparsegrad", "sst2", seed, 0.9, hparams={**study, **now})
    for seed in SEEDS:
        cases.run("sparsegrad", "sst2", seed, 0.5, name=f"old{seed}", hparams={**study, **of_run})
    (cases.results / "runs/evidence_paper/sparsegrad-sst2-2023.json").unlink()
    block = load(cases).blocks["evidence_paper"]
    assert sorted(run.path.stem for run in block.of("sparsegrad", "sst2").values()) == [
        "sparsegrad-sst2-3705", "sparsegrad-sst2-42",
    ]  # fmt: skip
    (said,) = block.apart
    assert re.search(rf"^sparsegrad sst2: of an earlier search \({change}.*\): old2023.json, old3705.json, old42", said)


def test_without_a_run_of_the_present_search_those_of_an_earlier_one_count(cases: Cases) -> None:
    cases.healthy()
    study = {"from": "search", "study": "evidence-minilm-lora_tuned-sst2", "train.lr": 3e-4}
    for seed in SEEDS:
        cases.run("lora_tuned", "sst2", seed, 0.8, hparams=study)
    block = load(cases).blocks["evidence_paper"]
    assert (sorted(block.of("lora_tuned", "sst2")), block.apart) == (sorted(SEEDS), [])


@pytest.mark.parametrize(
    ("grid", "options", "more", "departures"),
    [
        ({"method": "lora"}, {"rank": 7}, {}, []),
        ({"method": "lora"}, {"rank": 4}, {}, ["method.rank=4"]),
        ({"method": "sparsegrad", "method.keep": "4500,5500"}, {"keep": 5500}, {}, []),
        ({"method": "sparsegrad", "method.keep": "4500,5500"}, {"keep": 3}, {}, ["method.keep=3"]),
        ({"method": "sparsegrad", "method.basis": "hosvd,none"}, {"basis": "none"}, {}, []),
        ({"method": "sparsegrad", "method.basis": "none"}, {"steps": 3}, {}, ["method.basis=None", "method.steps=3"]),
        ({"method": "sparsegrad"}, {"engine": "merged", "rotation_order": "gradient"}, {}, []),
        ({"method": "full", "train.lr": "3.0e-5,1.0e-4"}, {}, {}, []),
        ({"method": "full", "train.lr": "3.0e-5,3.0e-4"}, {}, {}, ["train.lr=0.0001"]),
        ({"method": "full,peft/dora"}, {}, {"method": "dora"}, []),
    ],
)  # fmt: skip
def test_a_value_outside_the_grid_and_an_option_of_the_method_are_departures(
    cases: Cases, grid: dict[str, str], options: dict[str, Any], more: dict[str, str], departures: list[str]
) -> None:
    cases.plan(grid={"task": "sst2", "seed": "42", **grid})
    method = more.get("method") or grid["method"]
    record = json.loads(cases.run(method, "sst2", 42, 0.9, options=options).read_text())
    record["config"]["model"]["lora_rank"] = 7  # the default of LoRA's rank refers to it
    plan = read_plan("evidence_paper", cases.conf)
    assert plan is not None
    assert find_departures(record, plan) == departures


def test_a_plan_may_ask_for_more_seeds_than_three(cases: Cases) -> None:
    cases.healthy()
    cases.plan(rules={"min_seeds": 4})
    for path in sorted((cases.results / "runs" / "evidence_paper").glob("*.json")):
        replan(path, cases)
    found = load(cases).compare("evidence_paper", "sparsegrad", "lora_tuned", ["sst2"])
    assert found is not None
    assert (found.seeds, found.has_seeds, found.interval) == (3, False, None)


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


@pytest.mark.parametrize("name", [*BLOCKS, "compare", "compare_smollm2", "table9", "table11"])
def test_a_run_of_a_plan_follows_it(name: str) -> None:
    plan = read_plan(name)
    assert plan is not None
    others = {key: values[-1] for key, values in plan.grid.items() if key != "seed"}
    overrides = [f"experiment={name}", f"seed={plan.seeds[0]}", *(f"{key}={value}" for key, value in others.items())]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides)
    config: Any = OmegaConf.to_container(composed, resolve=True)
    record = {"config": config, "hparams": {"from": plan.hparams, "train.lr": 1e-4, "train.batch_size": 16}}
    assert find_departures(record, plan) == []
    other = copy.deepcopy(record)
    other["config"]["data"]["max_length"] = 7  # the plan has this from the task, and no setting for the blocks
    other["config"]["model"]["blocks"] = [0]
    assert sorted(find_departures(other, plan)) == ["data.max_length=7", "model.blocks=[0]"]
    config["protocol"]["max_steps"] = 4
    assert find_departures(record, plan) == ["protocol.max_steps=4"]
    config["model"]["name"] = "another"
    assert find_departures(record, plan) == ["protocol.max_steps=4", "model.name=another"]


@pytest.mark.parametrize("name", ["evidence_mlp_only", "compare"])
def test_all_methods_train_the_head_at_the_rate_of_the_plan(name: str) -> None:
    plan = read_plan(name)
    assert plan is not None
    rates = load_node(plan.path).evidence.head_lr
    for method, task in product(("random_mask", "lora_tuned"), plan.grid["task"]):
        overrides = [f"experiment={name}", f"method={method}", f"task={task}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config: Any = OmegaConf.to_container(compose("config", overrides), resolve=True)
        planned = None if method == "random_mask" else rates[task]  # whose head trains at the searched rate
        assert config["train"]["rest_lr"] == planned
        record = {"config": config, "hparams": {"from": "search", "train.lr": 1e-4}}
        assert find_departures(record, plan) == []
        config["train"]["rest_lr"] = 1e-5
        assert find_departures(record, plan) == ["train.rest_lr=1e-05"]


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


def test_a_number_without_a_dot_is_read_as_runs_read_it(cases: Cases) -> None:
    """To PyYAML 1e-1 is a text, so that a default would count as changed."""
    text = "name: mine\ndropout: 1e-1\nrate: ${oc.select:model.usual.rate,1e-3}\n"
    (cases.conf / "method").mkdir(parents=True)
    (cases.conf / "method" / "mine.yaml").write_text(text)
    assert arms._read_defaults("mine", cases.conf) == {
        "name": "mine", "dropout": 0.1, "rate": "${oc.select:model.usual.rate,1e-3}"
    }  # fmt: skip
    assert [arms.parse_scalar(one) for one in ("1e-3", "null", "true", "x")] == [0.001, None, True, "x"]


@pytest.mark.parametrize(
    ("option", "model"),
    [
        ("peft/dora", "smollm2"),
        ("peft/shira", "minilm"),
        ("peft", "minilm"),
        ("lora_xs", "smollm2"),
        ("sparsegrad", "smollm2"),
    ],
)
def test_an_arm_of_any_option_is_its_name_until_something_is_changed(option: str, model: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [f"method={option}", f"model={model}"])
    config: Any = OmegaConf.to_container(composed, resolve=True)
    assert arm_of(config) == option.rpartition("/")[2]
    if "config" in config["method"]:
        config["method"] |= {"budget": "density:0.05", "config": {**config["method"]["config"], "layers": 3}}
        assert arm_of(config) == f"{option.rpartition('/')[2]} budget=density:0.05 config.layers=3"


@pytest.mark.parametrize(("start", "departures"), [(0, []), (5, ["protocol.patience_from=0"])])
def test_a_setting_that_is_newer_than_a_record_has_its_old_meaning_there(
    cases: Cases, start: int, departures: list[str]
) -> None:
    cases.plan(protocol={"patience_from": start})
    record = {**json.loads(cases.run("sparsegrad", "sst2", 42, 0.8).read_text()), "hparams": {"from": "search"}}
    assert "patience_from" not in record["config"].get("protocol", {})
    plan = read_plan("evidence_paper", cases.conf)
    assert plan is not None
    assert [one for one in find_departures(record, plan) if one.startswith("protocol")] == departures
