"""The plans of the evidence: every cell builds, methods are treated alike, contradictions are refused."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from run_fixtures import ROOT

from experiments.report.blocks import STEPS
from experiments.report.plans import REGIMES
from experiments.reproduce import plans, search_all
from experiments.reproduce.cells import Cell, list_cells
from experiments.reproduce.plans import list_blocks, read_plan
from experiments.reproduce.search import Search
from sparsegrad.errors import UserError
from sparsegrad.files import load_json
from sparsegrad.runs.keys import determining, flatten
from sparsegrad.sweeps.search_plans import SEARCHED
from sparsegrad.sweeps.search_results import find_other_condition, select_conditions
from sparsegrad.sweeps.search_way import study_name

pytestmark = pytest.mark.xdist_group("evidence_plans")  # its fixtures take long: one worker makes them

CELLS = {
    "evidence_gates": 12,
    "evidence_paper": 160,
    "evidence_mlp_only": 105,
    "evidence_density": 36,
    "evidence_basis": 24,
    "evidence_base": 30,
    "evidence_smollm2": 15,
}
UNSEARCHED = "hparams=null"  # the searches are made later


def load(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "experiment" / f"{name}.yaml"))


@pytest.fixture(scope="module")
def cells() -> dict[str, list[Cell]]:
    """The cells of each plan with its first seed: composing those of all seeds takes a minute."""
    return {name: list_cells(name, [UNSEARCHED, f"seed={load(name)['evidence']['seeds'][0]}"]) for name in CELLS}


def test_every_plan_is_in_a_block() -> None:
    files = {path.stem for path in (ROOT / "conf" / "experiment").glob("evidence_*.yaml")}
    assert files == set(CELLS) == {name for step in STEPS for name in step.plans}


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_of_a_plan_builds(cells: dict[str, list[Cell]], name: str) -> None:
    node = load(name)["evidence"]
    assert len(cells[name]) * len(node["seeds"]) == CELLS[name]
    assert len({cell.config.key for cell in cells[name]}) == len(cells[name])
    for cell in cells[name]:
        assert cell.config.name == name
        assert (cell.config.protocol.select, cell.config.protocol.patience) == ("heldout", 5)
        assert cell.config.train.precision == "bf16"
        assert cell.config.train.train_rest is REGIMES[node["regime"]]
        if "epochs" in node:
            assert cell.config.protocol.epochs == node["epochs"][cell.config.task.name]
            assert cell.config.protocol.eval_steps == node["eval_steps"][cell.config.task.name]
            assert cell.config.train.batch_size == 32
            rows = {"sst2": 8000 if name == "evidence_gates" else 32000}.get(cell.config.task.name)
            assert cell.config.data.max_train == rows


@pytest.mark.parametrize("name", [*CELLS, "compare", "compare_smollm2"])
def test_a_plan_is_one_file(name: str) -> None:
    """Its hash is of this file alone, so nothing of it may come from another experiment."""
    text = load(name)
    assert all(isinstance(one, dict) for one in text["defaults"]), "only choices of groups"
    assert {"gates", "gate_method", "budget", "regime", "seeds", "min_seeds", "max_improving"} <= set(text["evidence"])
    head = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert ("make compare" if name.startswith("compare") else "make evidence BLOCK=") in head
    assert "hours on one core" in head


def test_patience_counts_from_the_middle_of_a_run() -> None:
    rows = {"stsb": 5174, "mrpc": 3300, "sst2": 28800, "cola": 7696}
    for name in ("evidence_paper", "evidence_mlp_only", "evidence_base"):
        node = load(name)["evidence"]
        for task, epochs in node["epochs"].items():
            evaluations = rows[task] // 32 * epochs / node["eval_steps"][task]
            assert 8 < evaluations < 14, (name, task)
            begin = node["patience_from"][task] / node["eval_steps"][task]
            assert begin == pytest.approx(evaluations / 2, abs=1), (name, task)


def test_blocks_2a_and_2b_are_the_plan_in_two_parts() -> None:
    one = ["task=stsb", "method=full", UNSEARCHED]  # composing all 140 cells again takes a minute
    parts = [list_cells("evidence_paper", [*block.overrides, *one]) for block in list_blocks("2")]
    assert [[cell.config.seed for cell in part] for part in parts] == [[42, 3705, 2023], [37, 7777]]
    whole = {cell.config.key for cell in list_cells("evidence_paper", one)}
    assert {cell.config.key for part in parts for cell in part} == whole


def test_blocks_come_in_their_order() -> None:
    assert [block.name for block in list_blocks("all")] == ["0", "1", "2a", "3", "4", "5", "6", "2b"]
    assert [block.name for block in list_blocks("4")] == ["4"]
    with pytest.raises(UserError, match="BLOCK=7 is not allowed: choose one of 0, 1, 2, 2a, 2b"):
        list_blocks("7")


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> list[Search]:
    where = f"results_dir={tmp_path_factory.mktemp('results')}"
    return search_all.plan_searches(search_all.Request(data="glue", trees="trees", overrides=(where,)))


def test_plans_that_share_a_search_train_as_it_does(cells: dict[str, list[Cell]], searches: list[Search]) -> None:
    stored = {one.study: select_conditions(flatten(determining(one.plan.base.resolved))) for one in searches}
    compared = list_cells("compare", [UNSEARCHED, "seed=42", "method=sparsegrad", "task=stsb,cola"])
    names = ("evidence_paper", "evidence_mlp_only", "evidence_density", "evidence_basis")
    for config in (cell.config for cell in [*compared, *(cell for name in names for cell in cells[name])]):
        study = study_name(config.model.name, config.method.name, config.task.name, config.train.train_rest)
        assert not find_other_condition(stored[study], OmegaConf.create(config.resolved), ["train.lr"]), config.name


def test_every_method_and_task_of_a_plan_has_a_search_of_its_own(searches: list[Search]) -> None:
    for name in SEARCHED:
        plan = read_plan(name)
        sweep = "evidence" if plan.regime == "paper" else "evidence_mlp_only"
        model = "smollm2" if plan.takes_trees else "minilm"
        wanted = {f"{sweep}-{model}-{m}-{t}" for m, t in product(plan.grid["method"], plan.grid["task"])}
        assert wanted <= {one.study for one in searches}
    assert len(searches) == len({one.study for one in searches}) == 32 + 21 + 5


def test_all_searches_of_a_plan_have_the_same_budget_and_protocol(
    searches: list[Search], cells: dict[str, list[Cell]]
) -> None:
    reports = {seed for name in CELLS for seed in load(name)["evidence"]["seeds"]}
    for name in SEARCHED:
        plan = read_plan(name)
        own = [one for one in searches if f"experiment={name}" in one.overrides]
        assert {one.plan.budget for one in own} == {plan.budget}
        for one in own:
            trial = one.plan.trial_config({"train.lr": 1e-3})
            same = next(
                cell.config
                for cell in cells[name]
                if (cell.config.method.name, cell.config.task.name) == (trial.method.name, trial.task.name)
            )
            assert (trial.protocol, trial.train.batch_size) == (same.protocol, same.train.batch_size)
            assert (trial.train.train_rest, trial.method) == (same.train.train_rest, same.method)
            assert trial.data.max_train == same.data.max_train
            assert trial.seed not in reports
            assert one.plan.sweep.objective == "heldout"
            assert one.plan.sweep.direction == ("minimize" if plan.takes_trees else "maximize")


def test_the_methods_that_a_plan_runs_were_searched(searches: list[Search], cells: dict[str, list[Cell]]) -> None:
    """`rates_of` and `carry` name methods and models that have a search of the same regime and budget."""
    found = {one.study: one.plan.budget for one in searches}
    for name in CELLS.keys() - {"evidence_gates"}:
        node = load(name)["evidence"]
        for cell in cells[name]:
            config = cell.config
            method = node.get("rates_of", {}).get(config.method.name, config.method.name)
            model = node.get("carry", {}).get("model", config.model.name)
            sweep = "evidence" if config.train.train_rest else "evidence_mlp_only"
            assert found[f"{sweep}-{model}-{method}-{config.task.name}"] == node["budget"]


def test_the_head_trains_at_the_rate_of_the_random_mask() -> None:
    """One rate for all methods of the regime, which committed searches found."""
    for name in ("evidence_mlp_only", "evidence_density", "evidence_basis", "compare"):
        node = load(name)
        assert node["evidence"]["head_lr"].keys() == set(node["hydra"]["sweeper"]["params"]["task"].split(","))
        for task, rate in node["evidence"]["head_lr"].items():
            study = study_name("minilm", "random_mask", task, train_rest=False)
            file = ROOT / "results" / "studies" / study / "summary.json"
            if not file.is_file():  # not searched yet: that of STS-B
                assert rate == node["evidence"]["head_lr"]["stsb"]
                continue
            found = load_json(file)
            assert rate == pytest.approx(found["best"]["values"]["train.lr"], rel=1e-3)
            assert not found["at_edge"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget: 8", "budget: 0", r"evidence\.budget=0 .*at least 1"),
        ("regime: paper", "regime: mlp_only", r"evidence\.regime=mlp_only .*train_rest is true"),
        ("regime: paper", "regime: both", "evidence.regime=both is not allowed: choose one of paper, mlp_only"),
        ("seeds: [42, 3705", "seeds: [43, 3705", r"evidence\.seeds=.*its runs have 42,3705"),
        ("  min_seeds: 3 # fewer make no claim\n", "", r"lacks evidence\.min_seeds"),
        ("evidence:\n", "evidense:\n", "evidence_paper"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    path = tmp_path / "conf" / "experiment" / "evidence_paper.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    monkeypatch.setattr(plans, "CONF", tmp_path / "conf")
    with pytest.raises(UserError, match=message):
        read_plan("evidence_paper")
