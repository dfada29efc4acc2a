"""Searches of one trial, for tests of which searches count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from experiments.reproduce import search_all
from experiments.reproduce.plans import read_plan
from experiments.reproduce.search import Search
from sparsegrad.sweeps.ledger import REASON
from sparsegrad.sweeps.show import export
from sparsegrad.sweeps.study import open_study


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def where(results: Path) -> tuple[str, str]:
    """A results folder of its own, and searches of one trial."""
    return f"results_dir={results}", "evidence.budget=1"


def plan(method: str, *overrides: str) -> Search:
    return search_all.plan_search(read_plan("compare"), method, "mrpc", None, overrides)


def store(search: Search, state: TrialState) -> optuna.Study:
    """A study whose only trial ended in this state."""
    study, is_complete = open_study(search.plan).study, state == TrialState.COMPLETE
    trial = optuna.trial.create_trial(
        state=state,
        value=0.5 if is_complete else None,
        params={"train.lr": 1e-4},
        distributions=search.plan.distributions,
        user_attrs={} if is_complete else {REASON: "training diverged"},
    )
    study.add_trial(trial)
    return study


def finish(search: Search) -> dict[str, Any]:
    return export(store(search, TrialState.COMPLETE), search.summary.parent)
