"""Sweeps in one process: what is searched, how trials end, and what a study holds in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from omegaconf import DictConfig
from optuna.study import Study
from optuna.trial import TrialState
from run_fixtures import ROOT, Composer, last_wins

from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.runs.records import read_record, run_seconds
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.samplers import sampler
from sparsegrad.sweeps.show import summary
from sparsegrad.sweeps.space import Dimension, Space
from sparsegrad.sweeps.study import load_study, open_study

LR = "sweep.space={train.lr:{float:[1e-5,1e-1],log:true}}"
FAKE = ("sweep.runner=sweep_fakes.run", "protocol.patience=null", "sweep.study=s", "sweep.heartbeat=0.2")
Sweep = Callable[..., DictConfig]


@pytest.fixture
def composed(conf: Composer, small: tuple[str, ...]) -> Sweep:
    """`composed(*overrides)`: a small configuration with `sweep=custom` over the learning rate, run by the stand-in."""

    def made(*overrides: str) -> DictConfig:
        given = [one for one in small if not one.startswith("train.lr")]
        return conf(*last_wins(*given, "sweep=custom", "sweep.trials=6", LR, *FAKE, *overrides))

    return made


def study_of(composed: DictConfig) -> Study:
    return load_study(make_plan(composed).sweep.storage, "s")


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml")))
@pytest.mark.parametrize("method", ["sparsegrad", "lora", "full"])
def test_every_sweep_yaml_makes_a_plan(conf: Composer, name: str, method: str) -> None:
    extra = [LR] if name == "custom" else []
    plan = make_plan(conf(f"sweep={name}", f"method={method}", *extra))
    assert plan.sweep.name == name
    assert plan.sweep.study == f"{name}-minilm-{method}-snippets"
    assert "train.lr" in plan.space.distributions


def test_paper_and_authors_search_what_they_say(conf: Composer) -> None:
    paper, authors = (make_plan(conf(f"sweep={name}", "task=cola")) for name in ("paper", "authors"))
    assert paper.space.plain() == {
        "train.batch_size": {"choice": [8, 16, 32]},
        "train.lr": {"float": [1e-6, 1e-1], "log": True},
    }
    assert authors.space.plain()["train.batch_size"] == {"choice": [16, 32]}
    assert (paper.budget, paper.sweep.sampler, paper.sweep.pruner) == (40, "tpe", "none")
    assert (paper.base.protocol.select, paper.base.protocol.name) == ("heldout", "paper-heldout")
    assert (authors.base.protocol.select, authors.base.protocol.name) == ("validation", "paper")


WIDE = {
    "sparsegrad": {"density", "steps"},
    "sparsegrad_authors": {"density", "steps"},  # its YAML has `keep`
    "lora": {"rank", "dropout"},
    "peft/lora_ga": {"budget", "steps", "config.lora_alpha", "config.lora_dropout"},
    "peft/vera": {"config.d_initial", "config.r"},
    "full": set(),
}


@pytest.mark.parametrize("method", WIDE)
def test_wide_searches_what_the_method_has(conf: Composer, method: str) -> None:
    extra = ("model=smollm2", "task=oasst1", "sweep.direction=minimize") if method == "sparsegrad" else ()  # has `keep`
    keys = set(make_plan(conf("sweep=wide", f"method={method}", *extra)).space.distributions)
    assert keys == {"train.batch_size", "train.lr", "train.weight_decay"} | {f"method.{one}" for one in WIDE[method]}


def test_wide_knows_the_settings_of_every_method() -> None:
    space = yaml.safe_load((ROOT / "conf" / "sweep" / "wide.yaml").read_text())["sweep"]["space"]
    inherited = {
        "random_mask": {"density"},
        "sparsegrad_small": {"density", "steps"},
        "sparsegrad_static": {"density", "steps"},
    }
    for path in (ROOT / "conf" / "method").rglob("*.yaml"):
        node = yaml.safe_load(path.read_text())
        own = {one for one in ("density", "steps", "rank", "dropout", "budget") if node.get(one) is not None}
        # The base of all methods of peft has none of its own; its size is given or searched by a budget.
        own = set() if path.stem == "peft" else own - ({"rank"} if "density" in own else set())
        for field in own | inherited.get(path.stem, set()):
            assert path.stem in space[f"method.{field}"]["methods"], (path.stem, field)


def test_a_sweep_finishes_its_trials_and_leaves_a_record_of_each(composed: Sweep, tmp_path: Path) -> None:
    run_sweep(composed())
    study = study_of(composed())
    assert states(study) == ["COMPLETE"] * 6
    records = [read_record(path) for path in (tmp_path / "results" / "runs" / "s").glob("*.json")]
    assert sorted(record["sweep"]["trial"] for record in records) == list(range(6))
    for record in records:
        trial = study.trials[record["sweep"]["trial"]]
        assert record["config"]["train"]["lr"] == trial.params["train.lr"]
        assert record["evaluations"][-1]["accuracy"] == trial.value
        assert record["sweep"] | {"trial": 0} == {
            "study": "s",
            "trial": 0,
            "metric": "accuracy",
            "objective": "heldout",
        }
        assert "sweep" not in record["config"]
        assert record["config"]["protocol"]["select"] == "heldout"


def test_a_rerun_does_nothing_and_more_trials_only_the_missing(composed: Sweep) -> None:
    run_sweep(composed())
    before = study_of(composed()).trials
    run_sweep(composed())
    assert study_of(composed()).trials == before
    run_sweep(composed("sweep.trials=8"))
    assert study_of(composed()).trials[:6] == before
    assert len(study_of(composed()).trials) == 8


def test_a_trial_that_was_run_before_says_so_and_the_hints_name_the_place(
    composed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(composed())
    assert "from record" not in capsys.readouterr().out
    for path in (tmp_path / "results" / "runs").rglob("*.json"):
        write_json(path, {**json.loads(path.read_text()), "environment": {"seconds": 100.0}})
    run_sweep(composed("sweep.overwrite=true"))
    assert summary(study_of(composed()))["seconds"] == 600, "the trials found their records, but the search took hours"
    again = capsys.readouterr().out
    results = tmp_path / "results"
    assert all(f", from record {results}" in line for line in again.splitlines() if line.startswith("trial "))
    assert f"use it: hparams=study:s results_dir={results};" in again
    assert f"sparsegrad.sweeps show s --results-dir {results}\n" in again


@pytest.mark.parametrize("name", ["tpe", "gp", "qmc", "random", "grid"])
def test_one_worker_with_a_seed_makes_the_same_trials_twice(composed: Sweep, name: str) -> None:
    points = "sweep.space={train.lr:{float:[1e-5,1e-1],log:true,points:6},train.batch_size:{choice:[4,8]}}"
    found = []
    for study in ("a", "b"):
        options = composed(points, f"sweep.sampler={name}", "sweep.startup_trials=3", f"sweep.study={study}")
        run_sweep(options)
        found.append([trial.params for trial in load_study(make_plan(options).sweep.storage, study).trials])
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert len({json.dumps(params) for params in found[0]}) == 6


def test_another_seed_makes_other_trials(composed: Sweep) -> None:
    found = []
    for seed in (1, 2):
        options = composed(f"sweep.seed={seed}", f"sweep.study=s{seed}")
        run_sweep(options)
        found.append([trial.params for trial in load_study(make_plan(options).sweep.storage, f"s{seed}").trials])
    assert found[0] != found[1]


def test_workers_that_ask_at_once_do_not_draw_the_same(composed: Sweep) -> None:
    plan = make_plan(composed())
    taken = [open_study(plan).take() for _ in range(4)]
    rates = {trial.params["train.lr"] for trial in taken if trial is not None}
    assert len(rates) == 4


def test_a_grid_is_tried_as_a_whole_and_once(composed: Sweep) -> None:
    options = composed("sweep.space={train.batch_size:{choice:[2,4]},method.steps:{int:[1,3]}}", "sweep.sampler=grid")
    run_sweep(options)
    found = [tuple(trial.params.values()) for trial in study_of(options).trials]
    assert sorted(found) == [(batch, steps) for batch in (2, 4) for steps in (1, 2, 3)]


def test_qmc_covers_the_range_evenly() -> None:
    space = Space((Dimension(key="x", kind="float", values=(0.0, 1.0)),))
    study = optuna.create_study(sampler=sampler("qmc", space, seed=3, startup_trials=10))
    found = sorted(study.ask(space.distributions).params["x"] for _ in range(8))
    assert [int(value * 8) for value in found] == list(range(8))


def test_divergence_and_nan_prune_a_trial_with_its_reason(composed: Sweep, tmp_path: Path) -> None:
    options = composed("sweep.space={train.lr:{choice:[1e-3,0.3,0.9]}}", "sweep.sampler=grid")
    run_sweep(options)
    by_rate = {trial.params["train.lr"]: trial for trial in study_of(options).trials}
    assert {rate: trial.state.name for rate, trial in by_rate.items()} == {
        1e-3: "COMPLETE",
        0.3: "PRUNED",
        0.9: "PRUNED",
    }
    assert "not a number" in by_rate[0.3].user_attrs["reason"]
    assert "diverged" in by_rate[0.9].user_attrs["reason"]
    statuses = [read_record(path)["status"] for path in (tmp_path / "results" / "runs" / "s").glob("*.json")]
    assert sorted(statuses) == ["complete", "failed", "failed"]


def test_real_runs_are_pruned_and_leave_their_records(composed: Sweep, tmp_path: Path) -> None:
    options = composed(
        "sweep.runner=sparsegrad.runs.run",
        "sweep.space={train.lr:{choice:[1e-9,1e-2]}}",
        "sweep.sampler=grid",
        "sweep.pruner=patience",
        "sweep.pruner_patience=1",
        "sweep.metric=loss",
        "sweep.direction=maximize",  # upside down: whatever learns is pruned
        "method=lora",
        "protocol.max_steps=6",
        "protocol.eval_steps=1",
    )
    run_sweep(options)
    study = study_of(options)
    pruned = next(trial for trial in study.trials if trial.params["train.lr"] == 1e-2)
    assert pruned.state == TrialState.PRUNED
    assert 1 < len(pruned.intermediate_values) < 6
    records = {
        one["sweep"]["trial"]: one for one in map(read_record, (tmp_path / "results" / "runs" / "s").glob("*.json"))
    }
    record = records[pruned.number]
    assert record["status"] == "failed"
    assert record["reason"] == pruned.user_attrs["reason"]
    assert run_seconds(record) == pruned.user_attrs["record_seconds"]
    assert [row["loss"] for row in record["evaluations"]] == list(pruned.intermediate_values.values())
    assert summary(study)["seconds_saved_by_pruning"] > 0
    assert not list((tmp_path / "work").glob("*/checkpoints"))


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning_ends_poor_trials_early(composed: Sweep, pruner: str) -> None:
    options = composed(f"sweep.pruner={pruner}", "sweep.trials=25", "sweep.sampler=random", "sweep.pruner_warmup=1")
    run_sweep(options)
    study = study_of(options)
    pruned = study.get_trials(states=[TrialState.PRUNED])
    assert 3 < len(pruned) < 25
    assert all(len(trial.intermediate_values) < 4 for trial in pruned)
    assert all("pruned by the sweep" in trial.user_attrs["reason"] for trial in pruned)
    assert summary(study)["seconds_saved_by_pruning"] >= 0
    if pruner == "median":
        assert all(len(trial.intermediate_values) > 1 for trial in pruned)


def test_validation_is_searched_only_when_asked(composed: Sweep) -> None:
    plan = make_plan(composed("sweep.objective=validation"))
    assert plan.base.protocol.select == "validation"
    run_sweep(composed())
    with pytest.raises(UserError, match=r"study s exists with another objective: there heldout, here validation"):
        run_sweep(composed("sweep.objective=validation"))


def test_a_journal_file_serves_too(composed: Sweep, tmp_path: Path) -> None:
    options = composed(f"sweep.storage='journal:{tmp_path}/s.log'")
    run_sweep(options)
    assert states(study_of(options)) == ["COMPLETE"] * 6
