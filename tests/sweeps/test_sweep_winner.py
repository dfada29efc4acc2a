"""The winner of a study: sampler, summary, `hparams=study:` and messages choose the same trial, also of equal ones."""

from __future__ import annotations

import csv
from pathlib import Path

import optuna
import pytest
import sweep_fakes
from optuna.study import Study
from optuna.trial import TrialState, create_trial
from run_fixtures import ROOT, Composer
from test_adaptive_grid import Sweep, study_of
from test_adaptive_grid import composed as composed  # the fixture

from sparsegrad.files import read_json
from sparsegrad.runs.records import run_seconds
from sparsegrad.sweeps import hparams
from sparsegrad.sweeps.adaptive_grid import find_best
from sparsegrad.sweeps.ledger import REDO_OF, find_first_best, find_winner
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.show import summary

SUMMARIES = sorted((ROOT / "results" / "studies").glob("*/summary.json"))


def make_study(scores: list[float | None], direction: str = "maximize") -> Study:
    """A study whose trials have the rates 0, 1, 2, ... and these scores; None: pruned."""
    study = optuna.create_study(direction=direction)
    for number, score in enumerate(scores):
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if score is None else TrialState.COMPLETE,
                value=score,
                params={"train.lr": float(number)},
                distributions={"train.lr": optuna.distributions.FloatDistribution(0, 99)},
            )
        )
    return study


def test_of_equal_scores_the_earliest_wins() -> None:
    assert find_first_best([None, 0.1, 0.9, 0.9]) == 2
    assert find_first_best([None, None]) is None
    for scores, direction, best in (
        ([0.1, None, 0.9, 0.9], "maximize", 2),
        ([0.9, 0.1, 0.5, 0.1], "minimize", 1),
    ):
        winner = find_winner(make_study(scores, direction))
        assert winner is not None
        assert winner.number == best
    assert find_winner(make_study([None])) is None


def test_a_repeated_trial_keeps_the_place_of_the_first() -> None:
    study = make_study([])
    distributions = {"train.lr": optuna.distributions.FloatDistribution(0, 99)}
    for state, value, attributes in (
        (TrialState.FAIL, None, {}),
        (TrialState.COMPLETE, 0.5, {}),
        (TrialState.COMPLETE, 0.5, {REDO_OF: 0}),
    ):
        params = {"train.lr": 1.0}
        study.add_trial(
            create_trial(state=state, value=value, params=params, distributions=distributions, user_attrs=attributes)
        )
    winner = find_winner(study)
    assert winner is not None
    assert winner.number == 2


def test_the_search_narrows_around_the_rate_that_it_reports(
    composed: Sweep,
    conf: Composer,
    small: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep_fakes, "score", lambda lr: 0.5 if 1e-5 <= lr <= 2e-3 else 0.1)  # a plateau
    run_sweep(composed())
    study = study_of(composed())
    rates = [trial.params["train.lr"] for trial in study.trials]
    assert rates == [1e-4, 1e-3, 1e-5, 1e-2, 3.16e-5, 3.16e-4, 5.62e-5, 1.78e-4]
    figures = summary(study)
    assert (figures["best"]["trial"], figures["best"]["values"]) == (0, {"train.lr": 1e-4})
    assert figures["at_edge"] is False
    assert "trial 0: train.lr=0.0001" in capsys.readouterr().out
    run = conf(*[one for one in small if not one.startswith("train.lr")], "hparams=study:s")
    assert hparams.apply(run, ()) == {"from": "study:s", "train.lr": 1e-4}


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_committed_summaries_have_the_winner_of_the_rule(path: Path) -> None:
    """Of the finished trials of an export, each slot has one, in the order of the slots."""
    figures = read_json(path)
    with (path.parent / "trials.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["state"] in ("complete", "pruned")]
    sign = -1 if figures["metric"] in ("nll", "loss", "perplexity") else 1
    scores = [sign * float(row["value"]) if row["state"] == "complete" else None for row in rows]
    best = find_first_best(scores)
    assert best is not None
    assert int(rows[best]["trial"]) == figures["best"]["trial"]
    rates = {float(row["train.lr"]): score for row, score in zip(rows, scores, strict=True)}
    assert find_best(rates) == figures["best"]["values"]["train.lr"]


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_the_time_of_a_committed_search_has_that_of_stopped_processes(path: Path) -> None:
    """A trial that was stopped and continued took as long as its record says, not as its last process."""
    with (path.parent / "trials.csv").open(newline="") as lines:
        spent = {int(row["trial"]): float(row["seconds"]) for row in csv.DictReader(lines) if row["seconds"]}
        lines.seek(0)
        finished = {int(row["trial"]) for row in csv.DictReader(lines) if row["state"] in ("complete", "pruned")}
    for record in map(read_json, sorted((ROOT / "results" / "runs" / path.parent.name).glob("*.json"))):
        trial = record["sweep"]["trial"]
        if trial in finished:
            assert spent[trial] >= round(run_seconds(record) or 0.0, 2)
    assert read_json(path)["seconds"] == pytest.approx(sum(spent[trial] for trial in finished), abs=0.5)
