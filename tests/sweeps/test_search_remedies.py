"""`hparams=search` names a command that makes the search, or how to do without; and refuses one made otherwise."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from omegaconf import DictConfig
from run_fixtures import ROOT, Composer

from experiments.compare import methods
from experiments.report.comparison.notes import PLANS
from experiments.report.plans import EvidencePlan
from experiments.reproduce.plans import read_plan
from experiments.reproduce.search_all import plan_search
from sparsegrad.errors import UserError
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps import hparams, search_plans, search_way
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.search_results import SearchMissingError
from sparsegrad.sweeps.search_way import read_way

MEASURED = ROOT / "results" / "studies" / "evidence-minilm-lora-mrpc" / "summary.json"


def apply(conf: Composer, *overrides: str) -> dict[str, Any]:
    return hparams.apply(conf(*overrides, "hparams=search"), {key_of(one) for one in overrides})


def refuse(conf: Composer, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        apply(conf, *overrides)
    return str(error.value)


def test_the_plans_with_searches_are_those_of_the_commands() -> None:
    found = {plan.name: plan for plan in search_plans._read_plans()}
    assert list(found) == [*search_plans.SEARCHED, *search_plans.COMPARED]
    assert set(PLANS) == set(search_plans.COMPARED)
    for name, plan in found.items():
        grid = read_plan(name).grid
        assert plan.tasks == set(grid["task"])
        assert plan.methods == {one.rpartition("/")[2] for one in grid["method"]}


@pytest.mark.parametrize(
    ("overrides", "plan"),
    [
        ("experiment=evidence_paper method=lora task=cola", "evidence_paper"),
        ("experiment=evidence_basis task=sst2", "evidence_mlp_only"),
        ("experiment=compare method=lora task=mrpc", "compare"),
        ("experiment=compare method=meprop task=cola", "compare"),  # also of evidence_mlp_only
        ("experiment=compare method=peft/dora task=stsb", "compare"),
        ("experiment=compare_smollm2 method=lora_tuned data.dir=trees", "compare_smollm2"),
        ("experiment=evidence_smollm2 method=full data.dir=trees", "evidence_smollm2"),
        ("experiment=evidence_base method=meprop task=cola", "evidence_paper"),  # of the model that it carries from
    ],
)
def test_the_remedy_is_a_command_that_makes_the_search(
    overrides: str, plan: str, conf: Composer, tmp_path: Path
) -> None:
    said = refuse(conf, *overrides.split(), f"results_dir={tmp_path}")
    study, command = re.findall(r"the search (\S+) is missing .*?: (make .*?) fills what is missing", said)[0]
    words = shlex.split(command)
    given = dict(one.split("=", 1) for one in words[2:])
    assert (words[1], given["ARGS"]) == (read_target(plan), f"results_dir={tmp_path}")
    option = methods.find_method(given["METHODS"]) if words[1] == "compare" else given["METHODS"]
    chosen: EvidencePlan = read_plan(plan)
    assert given["TASKS"] in chosen.grid["task"]
    assert option in chosen.grid["method"] or words[1] == "compare"
    assert plan_search(chosen, option, given["TASKS"], None, [given["ARGS"]]).study == study


@pytest.mark.parametrize(
    ("overrides", "plan"),
    [
        ("method=lora task=stsb train.train_rest=false", "compare"),
        ("method=meprop task=cola train.train_rest=false", "evidence_mlp_only"),
        ("method=full task=sst2", "evidence_paper"),
        ("method=lora task=stsb", "evidence_paper"),
    ],
)
@pytest.mark.parametrize("is_measured", [False, True])
def test_a_run_of_no_plan_never_makes_a_search_of_a_plan_anew(
    overrides: str, plan: str, is_measured: bool, conf: Composer, tmp_path: Path
) -> None:
    said = refuse(conf, *overrides.split(), *([] if is_measured else [f"results_dir={tmp_path}"]))
    experiment = re.findall(r": give experiment=(\w+), to train as the search did; or give train\.lr=RATE", said)
    assert experiment == [plan]
    assert "make " not in said
    assert "overwrite" not in said
    assert said.count("; or ") == 1


def test_a_plan_of_ones_own_is_no_plan_of_the_commands(
    conf: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(search_plans.CONF, tmp_path / "conf")
    own = (search_plans.CONF / "experiment" / "evidence_paper.yaml").read_text().replace("stsb,", "rte,stsb,")
    (tmp_path / "conf" / "experiment" / "an_own.yaml").write_text(own)
    monkeypatch.setattr(search_plans, "CONF", tmp_path / "conf")
    search_plans._read_plans.cache_clear()
    try:
        said = refuse(conf, "experiment=evidence_paper", "method=lora", "task=rte", f"results_dir={tmp_path}")
    finally:
        search_plans._read_plans.cache_clear()
    assert "no plan has this search" in said


def read_target(plan: str) -> str:
    return "compare" if plan in PLANS else "search"


@pytest.mark.parametrize(
    "overrides",
    [
        "method=peft/dora task=stsb",
        "method=sparsegrad task=snippets",
        "method=lora task=stsb model=bert_base",
        "method=lora task=oasst1 model=smollm2 train.train_rest=true data.dir=/a/b",
        "method=sparsegrad_small task=sst2 model=minilm data.dir=/a/b",
    ],
)
def test_without_a_plan_the_remedy_is_a_search_of_the_users_own(overrides: str, conf: Composer, tmp_path: Path) -> None:
    own = [*overrides.split(), f"results_dir={tmp_path}"]
    said = refuse(conf, *own)
    command, study = re.findall(r"no plan has this search: .* run (.*), and give hparams=study:(\S+)$", said)[0]
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "run.py")
    plan = make_plan(conf(*words))
    assert plan.sweep.study == study
    wanted: DictConfig = conf(*own)
    assert plan.base.method.name == wanted.method.name
    assert (plan.base.train.train_rest, plan.base.data.dir) == (wanted.train.train_rest, wanted.data.dir)
    assert plan.sweep.storage == hparams.default_storage(str(tmp_path))


@pytest.mark.parametrize("plan", ["evidence_paper", "evidence_mlp_only", "compare", "evidence_smollm2"])
def test_the_way_is_that_of_the_sweep(plan: str, conf: Composer) -> None:
    train_rest = read_plan(plan).regime == "paper"
    made = make_plan(conf(f"experiment={plan}", f"sweep={'evidence' if train_rest else 'evidence_mlp_only'}"))
    assert read_way(train_rest) == {**made.way, "seed": made.base.seed}
    assert made.identity()["pruner"] == {"name": "median", "startup_trials": 2, "warmup": 5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"sampler": "adaptive_grid", "pruner": {"name": "median", "startup_trials": 2, "warmup": 5}}, ""),
        ({"sampler": None, "pruner": None}, ""),
        ({"pruner": {"name": "none"}}, "pruner=none, not median (startup_trials=2, warmup=5)"),
        (
            {"pruner": {"name": "median", "startup_trials": 2, "warmup": 1}},
            "pruner=median (startup_trials=2, warmup=1), not median",
        ),
        ({"sampler": "tpe"}, "sampler=tpe, not adaptive_grid"),
        ({"seed": 42}, "seed=42, not 7"),
        ({"space": {"train.lr": {"float": [3e-5, 1e-4]}}}, "space=train.lr={'float': [3e-05, 0.0001]}, not train.lr="),
        ({"direction": "minimize"}, "direction=minimize, not maximize"),
        ({"metric": "loss"}, "metric=loss, not accuracy"),
    ],
)
def test_a_search_that_was_made_otherwise_than_the_others_is_refused(
    change: dict[str, Any], said: str, conf: Composer, tmp_path: Path
) -> None:
    write_json(tmp_path / "studies" / MEASURED.parent.name / "summary.json", {**read_json(MEASURED), **change})
    run = ("experiment=evidence_paper", "method=lora", "task=mrpc", f"results_dir={tmp_path}")
    if not said:
        assert apply(conf, *run)["study"] == MEASURED.parent.name
        return
    with pytest.raises(SearchMissingError) as error:  # so that a comparison leaves out this arm alone
        apply(conf, *run)
    message = str(error.value)
    assert f"evidence-minilm-lora-mrpc was made with {said}" in message
    assert message.endswith(f'ARGS="results_dir={tmp_path} sweep.overwrite=true" makes it anew')


def test_a_search_on_other_data_is_refused_where_the_data_is_in_a_folder(
    conf: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda composed: read.append(composed.data.dir) or "other")
    run = ("experiment=evidence_paper", "method=lora", "task=mrpc")
    assert apply(conf, *run)["study"] == MEASURED.parent.name, "the hub's data is not fetched for this"
    message = refuse(conf, *run, "data.dir=glue")
    assert read == ["glue"]
    assert (
        "its data has the fingerprint 08c45713ac4bea8d, not other: give the data of the search as data.dir=; or make"
        in message
    )
    assert "make search SCALE=mini DATA=glue METHODS=lora TASKS=mrpc ARGS=results_dir=FOLDER searches this" in message
    assert "overwrite" not in message
    monkeypatch.undo()
    assert apply(conf, *run, f"data.dir={tmp_path}")["study"] == MEASURED.parent.name, "the run says what is missing"
