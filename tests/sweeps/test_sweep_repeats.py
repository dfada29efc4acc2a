"""A sweep that was stopped, or whose workers died or raced, tries the values of an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import sweep_fakes
from optuna.trial import Trial, TrialState
from test_sweep import Sweep
from test_sweep import composed as composed  # the fixture

from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.ledger import SURPLUS
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.samplers import sampler
from sparsegrad.sweeps.space import Dimension, Space
from sparsegrad.sweeps.study import SharedStudy, load_study, open_study

BOTH = "sweep.space={train.lr:{float:[1e-5,1e-1],log:true},train.batch_size:{int:[2,64]}}"
ADAPTIVE = (
    "sweep=evidence",
    "sweep.pruner=none",
    "sweep.trials=8",
    "sweep.space={train.lr:{float:[1e-5,1e-2],log:true,points:4}}",
)


def finish(shared: SharedStudy, trial: Trial | None) -> None:
    assert trial is not None
    shared.close(trial, TrialState.COMPLETE, {}, sweep_fakes.score(trial.params["train.lr"]))


@pytest.mark.parametrize("name", ["random", "tpe", "qmc", "gp"])
def test_a_stopped_sweep_continues_with_the_values_of_an_unbroken_one(
    name: str, composed: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"sweep.sampler={name}", "sweep.trials=8", "sweep.startup_trials=3", BOTH)
    run_sweep(composed(*given, "sweep.study=whole"))
    whole = load_study(make_plan(composed(*given)).sweep.storage, "whole")
    evaluations, count = sweep_fakes._evaluations, []

    def stop_twice(*arguments: Any) -> Any:
        count.append(1)
        if len(count) in (3, 7):
            raise KeyboardInterrupt
        return evaluations(*arguments)

    monkeypatch.setattr(sweep_fakes, "_evaluations", stop_twice)
    other = composed(*given, f"results_dir={tmp_path / 'other'}", f"sweep.storage={tmp_path / 'other.db'}")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_sweep(other)
    run_sweep(other)
    study = load_study(make_plan(other).sweep.storage, "s")
    assert len(study.trials) == 10
    done = [trial.params for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert done == [trial.params for trial in whole.trials]


def test_with_hyperband_no_two_trials_draw_the_same() -> None:
    """It shows a sampler only the trials of one bracket, by which slots cannot be counted."""
    space = Space((Dimension(key="x", kind="float", values=(0.0, 1.0)),))
    pruner = optuna.pruners.HyperbandPruner(max_resource=27)
    study = optuna.create_study(sampler=sampler("random", space, seed=3, startup_trials=1), pruner=pruner)
    plain = optuna.create_study(sampler=sampler("random", space, seed=3, startup_trials=1))
    found, expected = ([one.ask(space.distributions).params["x"] for _ in range(12)] for one in (study, plain))
    assert found == expected


def test_values_are_drawn_again_where_a_worker_died_before_it_had_stored_all(composed: Sweep) -> None:
    given = ("sweep.sampler=random", BOTH, "sweep.study=whole")
    run_sweep(composed(*given))
    whole = load_study(make_plan(composed(*given)).sweep.storage, "whole")
    shared = open_study(make_plan(composed("sweep.sampler=random", BOTH)))
    storage, study_id = shared.study._storage, shared.study._study_id
    lost = storage.create_new_trial(study_id)
    distribution = shared.plan.distributions["train.lr"]
    storage.set_trial_param(lost, "train.lr", whole.trials[0].params["train.lr"], distribution)
    run_sweep(composed("sweep.sampler=random", BOTH, "sweep.heartbeat=0.05"))
    done = [trial.params for trial in shared.study.trials if trial.state == TrialState.COMPLETE]
    # While it may still live, its values are not known to the worker, which goes on with the others.
    assert sorted(map(str, done)) == sorted(str(trial.params) for trial in whole.trials)


def test_the_score_of_a_trial_whose_first_worker_died_while_asking_counts(composed: Sweep) -> None:
    shared = open_study(make_plan(composed(*ADAPTIVE, "sweep.heartbeat=0.05")))
    finish(shared, shared.take())
    shared.study._storage.create_new_trial(shared.study._study_id)  # of a worker that is killed now
    run_sweep(composed(*ADAPTIVE, "sweep.heartbeat=0.05"))
    done = [trial.params["train.lr"] for trial in shared.study.trials if trial.state == TrialState.COMPLETE]
    assert len(set(done)) == 8
    assert {3.16e-4, 3.16e-3} <= set(done), "1e-3, the rate of the lost trial, is best"


def test_a_trial_that_was_asked_for_at_the_same_time_does_not_start_too_early(
    composed: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(composed(*ADAPTIVE, f"sweep.storage=journal:{tmp_path}/s.log"))  # which has no lock
    first, second = open_study(plan), open_study(plan)
    for trial in [first.take() for _ in range(4)]:
        finish(first, trial)
    ask, found = second.study.ask, []

    def ask_after_the_other(*arguments: Any) -> Trial:
        monkeypatch.undo()
        found.append(first.take())
        return ask(*arguments)

    monkeypatch.setattr(second.study, "ask", ask_after_the_other)
    assert second.take() is None, "its values depend on the trial that the other worker has just begun"
    (fifth,) = found
    assert fifth is not None
    assert fifth.params["train.lr"] == 3.16e-4
    finish(first, fifth)
    sixth = second.take()
    assert sixth is not None
    assert sixth.params["train.lr"] == 3.16e-3
    assert [SURPLUS in one.user_attrs for one in first.study.trials] == [False] * 5 + [True, False]
