"""A finished search counts only if it was made as the others are: same pruner, goal and data."""

from __future__ import annotations

import pytest
from search_cases import finish, plan
from search_cases import results as results  # the fixtures
from search_cases import where as where

from experiments.reproduce import search_all, searches, stale_searches
from experiments.reproduce.plans import read_plan
from experiments.reproduce.search import Search
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.sweeps import search_way
from sparsegrad.sweeps.search_results import OVERWRITE
from sparsegrad.sweeps.study import CONTENT, open_study

NARROW = "sweep.space={train.lr:{float:[3e-5,1e-4],log:true,points:4}}"


@pytest.mark.parametrize(
    "override", ["sweep.pruner=none", "sweep.pruner_warmup=1", "sweep.metric=loss", "sweep.direction=minimize", NARROW]
)
def test_a_search_that_was_made_in_another_way_counts_only_for_that_way(
    where: tuple[str, str], override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "ALIKE", ())  # as a search that run.py made, or an edited sweep
    search = plan("frozen", *where, override)
    finish(search)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"frozen-mrpc: .*, not .*same: make it anew with make compare .*{OVERWRITE}"
        ):
            plan("frozen", *where)
        assert plan("frozen", *where, override).is_finished
        assert stale_searches.find_staleness(plan("frozen", *where, OVERWRITE))
        assert not stale_searches.find_staleness(plan("frozen", *where, override, OVERWRITE))
        search.summary.unlink(missing_ok=True)  # the study says so, too
    stale_searches.delete_search(plan("frozen", *where, OVERWRITE))
    assert plan("frozen", *where).finished() == 0


def test_a_finished_search_of_other_data_is_refused_until_it_is_made_anew(
    where: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_on(*overrides: str) -> Search:
        return search_all.plan_search(read_plan("compare"), "frozen", "mrpc", "glue", (*where, *overrides))

    first = plan_on()
    summary = {**finish(first), "content": {"data": "old"}}
    write_json(first.summary, summary)
    assert plan_on().is_finished, "the data is not at hand"
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda _: "old")
    assert plan_on().is_finished
    monkeypatch.setattr(search_way, "_read_fingerprint", lambda _: "new")
    assert plan("frozen", *where).is_finished, "data of the hub is not fetched for this"
    said = r"the fingerprint old, not new: give the data of the search, or ARGS=results_dir=FOLDER"
    with pytest.raises(UserError, match=said):
        plan_on()
    anew = plan_on(OVERWRITE)
    assert stale_searches.find_staleness(anew) == "its data has the fingerprint old, not new"
    first.summary.unlink()
    open_study(first.plan).study.set_user_attr(CONTENT, {"data": "old"})
    with pytest.raises(UserError, match=said):
        plan_on()
    assert stale_searches.find_staleness(anew) == "its data has the fingerprint old, not new"
