"""Sampler adaptive_grid: where it looks after the grid, that the budget holds, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sweep_fakes
from omegaconf import DictConfig
from optuna.study import Study
from optuna.trial import TrialState, create_trial
from run_fixtures import Composer, last_wins

from sparsegrad.errors import UserError
from sparsegrad.sweeps.adaptive_grid import distributions, find_best, find_ratio, first_values, next_value
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.ledger import SURPLUS
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.samplers import sampler
from sparsegrad.sweeps.show import export, summary
from sparsegrad.sweeps.space import Dimension, Space
from sparsegrad.sweeps.study import load_study, open_study

GRID = Dimension(key="train.lr", kind="float", values=(1e-5, 1e-2), log=True, points=4)
FAKE = ("sweep.runner=sweep_fakes.run", "protocol.patience=null", "sweep.study=s", "sweep.heartbeat=0.2")
ADAPTIVE = ("sweep=custom", "sweep.sampler=adaptive_grid")
LOW = (*ADAPTIVE, "sweep.space={train.lr:{float:[1e-6,1e-4],log:true,points:3}}")  # the best rate, 1e-3, is beyond it
Sweep = Callable[..., DictConfig]


@pytest.fixture
def composed(conf: Composer, small: tuple[str, ...]) -> Sweep:
    """`composed(*overrides)`: a small configuration with `sweep=evidence`, run by the stand-in (best at 1e-3)."""

    def made(*overrides: str) -> DictConfig:
        given = [one for one in small if not one.startswith("train.lr")]
        return conf(*last_wins(*given, "sweep=evidence", "sweep.pruner=none", *FAKE, *overrides))

    return made


def rates(study: Study) -> list[float]:
    return [trial.params["train.lr"] for trial in study.trials]


def study_of(composed: DictConfig) -> Study:
    return load_study(make_plan(composed).sweep.storage, "s")


def test_the_grid_is_tried_from_its_middle() -> None:
    assert first_values(GRID) == [1e-4, 1e-3, 1e-5, 1e-2]
    five = Dimension(key="k", kind="float", values=(1e-4, 1.0), log=True, points=5)
    assert first_values(five) == [1e-2, 1e-3, 1e-1, 1e-4, 1.0]
    assert find_ratio(GRID) == pytest.approx(10)


@pytest.mark.parametrize(
    ("tried", "following"),
    [
        ({1e-5: 0.9, 1e-4: 0.5, 1e-3: 0.4, 1e-2: None}, 1e-6),  # the smallest wins: one step below
        ({1e-5: 0.1, 1e-4: 0.2, 1e-3: 0.4, 1e-2: 0.5}, 1e-1),  # the largest wins: one step above
        ({1e-5: 0.1, 1e-4: 0.9, 1e-3: 0.8, 1e-2: None}, 3.16e-4),  # equal gaps: towards the better neighbour
        ({1e-5: 0.8, 1e-4: 0.9, 1e-3: None, 1e-2: None}, 3.16e-5),
        ({1e-5: 0.1, 1e-4: 0.9, 3.16e-4: 0.8, 1e-3: 0.7}, 3.16e-5),  # the wider gap first
        ({1e-5: None, 1e-4: 0.9, 1e-3: None, 1e-2: None}, 3.16e-5),  # neither has a score: the smaller rate
        ({1e-5: None, 1e-4: None}, 1e-6),  # everything diverged
        ({1e-4: 0.9, 1e-3: 0.5, 1e-5: 0.9, 1e-2: 0.1}, 3.16e-5),  # of equal scores the earliest wins: no edge here
        ({1e-3: 0.5, 1e-5: 0.9, 1e-4: 0.9, 1e-2: 0.1}, 1e-6),
    ],
)
def test_the_rule_of_the_next_rate(tried: dict[float, float | None], following: float) -> None:
    assert next_value(tried, 10) == pytest.approx(following, rel=1e-9)


def test_the_rule_finds_the_best_rate_of_a_smooth_function_within_eight_trials() -> None:
    for peak in (-6.3, -5.0, -4.2, -3.5, -3.0, -2.1, -1.4):

        def score(rate: float, peak: float = peak) -> float:
            return -((math.log10(rate) - peak) ** 2)

        tried: dict[float, float | None] = {rate: score(rate) for rate in first_values(GRID)}
        while len(tried) < 8:
            tried[next_value(tried, 10)] = score(next_value(tried, 10))
        best = find_best(tried)
        assert best is not None
        assert min(tried) < best < max(tried), peak
        assert abs(math.log10(best) - peak) < 0.3, peak


@pytest.mark.parametrize("rates_improve", [None, False, True])
def test_an_extension_ends_eight_steps_beyond_the_grid(rates_improve: bool | None) -> None:
    """Further trials narrow: whether none has a score, or the smallest or the largest always wins."""
    space = Space((GRID,))
    study = optuna.create_study(direction="maximize", sampler=sampler("adaptive_grid", space, 0, 1))
    for _ in range(16):
        trial = study.ask(distributions(space))
        rate = trial.params["train.lr"]
        if rates_improve is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, rate if rates_improve else -rate)
    found = rates(study)
    assert len(set(found)) == 16
    edge = max(found) / 1e-2 if rates_improve else 1e-5 / min(found)
    assert edge == pytest.approx(1e8)


def test_a_search_narrows_within_its_budget(composed: Sweep) -> None:
    run_sweep(composed())
    found = rates(study_of(composed()))
    assert len(found) == 8
    assert found[:6] == [1e-4, 1e-3, 1e-5, 1e-2, 3.16e-4, 3.16e-3]
    assert len(set(found)) == 8
    figures = summary(study_of(composed()))
    assert (figures["budget"], figures["at_edge"], figures["seed"]) == (8, False, 7)
    assert figures["best"]["values"]["train.lr"] == 1e-3


def test_an_edge_winner_extends_the_grid_within_the_budget(composed: Sweep) -> None:
    low = composed(*LOW, "sweep.trials=6")
    run_sweep(low)
    assert rates(study_of(low)) == [1e-5, 1e-6, 1e-4, 1e-3, 1e-2, 3.16e-4]
    assert summary(study_of(low))["at_edge"] is False


def test_a_budget_that_ends_at_an_edge_says_so(composed: Sweep) -> None:
    low = composed(*LOW, "sweep.trials=3")
    run_sweep(low)
    assert summary(study_of(low))["at_edge"] is True


def test_a_loss_is_searched_downwards(composed: Sweep) -> None:
    loss = composed("sweep.direction=minimize", "sweep.trials=5")
    run_sweep(loss)
    assert rates(study_of(loss))[4] == 1e-6, "the score is best at 1e-3, so the smallest of it is at an edge"


def test_a_stopped_search_continues_as_if_nothing_had_happened(
    composed: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(composed("sweep.study=whole"))
    whole = load_study(make_plan(composed()).sweep.storage, "whole")
    evaluations, count = sweep_fakes._evaluations, []

    def stop_once(*arguments: object) -> object:
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return evaluations(*arguments)  # type: ignore[arg-type]

    # Records of the first search would make the second one instant.
    other = f"results_dir={tmp_path / 'other'}", f"sweep.storage={tmp_path / 'other.db'}"
    monkeypatch.setattr(sweep_fakes, "_evaluations", stop_once)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(composed(*other))
    run_sweep(composed(*other))
    done = [one for one in study_of(composed(*other)).trials if one.state == TrialState.COMPLETE]
    assert [one.params["train.lr"] for one in done] == rates(whole)
    made = len(count)
    run_sweep(composed(*other))
    assert len(count) == made == 9, "eight trials, one of them twice; nothing is repeated"


def test_a_second_worker_waits_for_the_trials_that_decide(composed: Sweep) -> None:
    shared = open_study(make_plan(composed("sweep.trials=6")))
    first = [shared.take() for _ in range(4)]
    assert [one.params["train.lr"] for one in first if one] == [1e-4, 1e-3, 1e-5, 1e-2]
    assert shared.take() is None, "the grid is still running"
    for one in first:
        assert one is not None
        shared.close(one, TrialState.COMPLETE, {}, sweep_fakes.score(one.params["train.lr"]))
    following = shared.take()
    assert following is not None
    assert following.params["train.lr"] == 3.16e-4
    assert shared.take() is None


@pytest.mark.parametrize("first", ["sweep.db", "journal:sweep.log"])
def test_workers_that_wait_for_a_repeated_trial_add_no_trials(composed: Sweep, tmp_path: Path, first: str) -> None:
    kind, _, name = first.rpartition(":")
    where = f"{kind}:{tmp_path / name}" if kind else str(tmp_path / name)
    shared = open_study(make_plan(composed(f"sweep.storage={where}", "sweep.trials=6")))
    for number, rate in enumerate([1e-4, 1e-3, 1e-5, 1e-2, 3.16e-4, 3.16e-3]):
        state, value = (TrialState.COMPLETE, sweep_fakes.score(rate)) if number < 4 else (TrialState.FAIL, None)
        kinds = shared.plan.distributions
        shared.study.add_trial(create_trial(state=state, value=value, params={"train.lr": rate}, distributions=kinds))
    running = shared.take()
    assert running is not None
    for _ in range(20):
        assert shared.take() is None, "the fourth is running"
    # One that another worker took too early, as of a storage without a lock.
    early = shared.study.ask(shared.plan.distributions)
    shared.close(early, TrialState.FAIL, {SURPLUS: True})
    for _ in range(20):
        assert shared.take() is None
    assert len(shared.study.trials) <= 10
    shared.close(running, TrialState.COMPLETE, {}, 0.9)
    last = shared.take()
    assert last is not None
    assert [one.params["train.lr"] for one in (running, last)] == [3.16e-4, 3.16e-3]
    shared.close(last, TrialState.COMPLETE, {}, 0.8)
    assert shared.is_finished()


def test_two_processes_share_one_search(composed: Sweep) -> None:
    both = composed("sweep.workers=2", "protocol.patience=200", "sweep.trials=6")
    run_sweep(both)
    study = study_of(both)
    done = [one for one in study.trials if one.state == TrialState.COMPLETE]
    assert sorted(one.params["train.lr"] for one in done) == [1e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]


@pytest.mark.parametrize(
    "space",
    [
        "{train.lr:{float:[1e-5,1e-2],log:true,points:4},train.weight_decay:{choice:[0.0,0.1]}}",
        "{train.lr:{float:[1e-5,1e-2],log:true}}",
        "{train.lr:{float:[1e-5,1e-2],points:4}}",
        "{train.batch_size:{choice:[4,8]}}",
    ],
)
def test_what_is_no_adaptive_grid_is_refused(composed: Sweep, space: str) -> None:
    with pytest.raises(UserError, match="adaptive_grid searches exactly one range with log and points"):
        make_plan(composed(*ADAPTIVE, f"sweep.space={space}"))


@pytest.mark.parametrize("override", ["sweep.trials=0", "+evidence={budget:0}"])
def test_a_budget_of_zero_is_refused(composed: Sweep, override: str) -> None:
    with pytest.raises(UserError, match=r"sweep\.trials=0"):
        make_plan(composed(override))


def test_a_search_is_not_continued_with_another_budget(composed: Sweep) -> None:
    run_sweep(composed("sweep.trials=5"))
    with pytest.raises(UserError, match=r"study s exists with another budget: there 5, here 8; .*sweep\.overwrite"):
        run_sweep(composed())
    run_sweep(composed("sweep.overwrite=true"))
    assert len(rates(study_of(composed()))) == 8


def test_the_exported_summary_is_all_that_is_needed(composed: Sweep, tmp_path: Path) -> None:
    run_sweep(composed("sweep.trials=5"))
    export(study_of(composed()), tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert figures["train_rest"] is True
    assert figures["trials"]["complete"] == 5
    assert len((tmp_path / "out" / "trials.csv").read_text().splitlines()) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json", "trials.csv"]


def test_a_search_is_not_continued_with_another_pruner_which_its_summary_names(composed: Sweep) -> None:
    run_sweep(composed("sweep.trials=5"))
    figures = summary(study_of(composed()))
    assert (figures["sampler"], figures["pruner"]) == ("adaptive_grid", {"name": "none"})
    median = ("sweep.trials=5", "sweep.pruner=median")
    with pytest.raises(UserError, match=r"exists with another pruner: there .*none.*, here .*median.*overwrite"):
        run_sweep(composed(*median))
    study = study_of(composed())
    earlier = {key: value for key, value in study.user_attrs["identity"].items() if key not in ("sampler", "pruner")}
    study.set_user_attr("identity", earlier)  # as earlier versions stored it
    run_sweep(composed(*median))
    assert summary(study_of(composed()))["pruner"] is None
