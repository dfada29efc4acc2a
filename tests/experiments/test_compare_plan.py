"""The committed plans of the comparison."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments.compare.methods import list_methods
from experiments.paths import CONF
from experiments.report.comparison.notes import PLANS
from experiments.report.plans import read_plan as read_stored_plan
from experiments.reproduce import search_all
from experiments.reproduce.plans import read_plan
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.peft_size import Weight, fit_budget
from sparsegrad.runs.config import build
from sparsegrad.sweeps.search_plans import COMPARED


def test_the_committed_plan_compares_ten_methods_in_the_protocol_of_the_searches() -> None:
    mine, theirs = read_plan("compare"), read_plan("evidence_mlp_only")
    assert len(mine.grid["method"]) >= 10
    assert mine.budget == theirs.budget
    assert set(mine.grid["method"]) <= set(list_methods())
    assert len(read_plan("compare_smollm2").grid["method"]) == 5
    assert PLANS.keys() == set(COMPARED)


def test_every_method_of_the_language_model_trains_the_planned_share() -> None:
    plan = read_stored_plan("compare_smollm2")
    assert plan is not None
    assert plan.share is not None
    for method in plan.grid["method"]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = build(compose("config", [f"experiment={plan.experiment}", f"method={method}", "hparams=null"]))
        sizes = config.model.architecture
        out, columns = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
        assert share_of(config.method, out, columns) == pytest.approx(
            plan.share, rel=0.13 if method == "peft/dora" else 0.001
        ), f"{method}: DoRA has magnitudes beside its whole ranks"
        assert config.save_adapter == "sparsegrad"
    search = search_all.plan_search(read_plan(plan.experiment), "peft/dora", "oasst1", "trees", ())
    assert search.plan.base.save_adapter is None, "only runs keep adapters, not the trials of a search"


def share_of(method: Any, out: int, columns: int) -> float:
    """Share of the entries of a weight of each shape that a method trains."""
    if isinstance(method, Peft):
        shapes = {"up": (columns, out), "down": (out, columns)}
        weights = {kind: Weight(*shape, False, 1) for kind, shape in shapes.items()}
        found = fit_budget(dict(method.config), weights, float(method.budget.partition(":")[2]))
        return float(found["share"])
    if rank := getattr(method, "rank", None):
        return float(rank * (out + columns) / (out * columns))
    return float(method.density or method.keep / (out * columns))
