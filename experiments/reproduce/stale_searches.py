"""Whether a stored search is the one that is asked for, and the deletion of one that is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.reproduce.search import Search, compose_sweep
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.runs.overrides import key_of
from sparsegrad.runs.predictions import predictions_path
from sparsegrad.runs.records import read_record
from sparsegrad.runs.run_folder import delete_checkpoints_of_other_data
from sparsegrad.sweeps.search_results import (
    OTHER_FOLDER,
    OWN_NAME,
    find_difference,
    find_other_condition,
    read_settings,
    select_conditions,
    select_settings,
)
from sparsegrad.sweeps.search_way import find_other_data, find_other_way
from sparsegrad.sweeps.storage import open_store
from sparsegrad.sweeps.study import CONTENT, IDENTITY, content_of, delete, find_refusal, read_fingerprint


def check_stored(search: Search) -> None:
    """Refuse a study or summary of something else: it would count as this search."""
    if found := _find_other_condition(search):
        remedy = f"make it anew with {search.anew}, or leave that setting as it was"
        raise UserError(f"search {search.study} was made with {found}: {remedy}")
    if found := _find_other_setting(search):
        raise UserError(f"search {search.study} was made with {found}: {OWN_NAME}; or make it anew with {search.anew}")
    if found := _find_other_goal(search):
        raise UserError(
            f"search {search.study}: {found}: all methods need the same: make it anew with {search.anew}, or ask for "
            "the same"
        )
    if found := find_other_data(_read_content(search), search.plan.composed):
        raise UserError(  # not anew: runs have taken their rates from it
            f"search {search.study}: {found}: give the data of the search, or ARGS={OTHER_FOLDER} for searches of this "
            "data and their runs"
        )


def find_staleness(search: Search) -> str:
    """Why `sweep.overwrite=true` makes a search anew; empty if there is none, or if it is the one asked for.

    A search that was begun anew is the one asked for, so the same command continues it instead of deleting it again.
    """
    if found := _find_other_condition(search) or _find_other_setting(search):
        return f"it was made with {found}"
    if search.is_barren:
        return "no trial was completed"
    if found := _find_other_goal(search):
        return found
    if found := find_other_data(_read_content(search), search.plan.composed, of_hub=True):
        return found
    study = None if search.is_finished else search.load_study()
    # A worker compares more than what makes a finished search another one.
    return "" if study is None else find_refusal(search.plan, study)


def _find_other_condition(search: Search) -> str:
    """How a study or summary was trained otherwise, on other data or with another protocol."""
    searched = search.plan.space.distributions
    stored = [select_conditions(fixed) for fixed in _read_fixed(search)]
    found = (find_other_condition(one, search.plan.composed, searched) for one in (*stored, search.read_summary()))
    return next(filter(None, found), "")


def _find_other_setting(search: Search) -> str:
    """Which setting of the method a study or summary has otherwise."""
    here, stored = read_settings(search.plan.composed, search.plan.base.seed), list[Any]()
    stored += [select_settings(fixed) for fixed in _read_fixed(search)]
    if summary := search.read_summary():
        stored.append(summary.get("method") or _read_defaults(search))  # earlier summaries do not list settings
    searched = search.plan.space.distributions  # these have no fixed value
    here = {key: value for key, value in here.items() if f"method.{key}" not in searched}
    for there in filter(None, stored):
        there = {key: value for key, value in there.items() if f"method.{key}" not in searched}
        if found := find_difference(there, here):
            return found
    return ""


def _find_other_goal(search: Search) -> str:
    """Whether a study or summary looked for something else, or in another way, or had another budget."""
    wanted: dict[str, Any] = json.loads(json.dumps(search.plan.identity()))  # as a storage has it
    study, summary = search.load_study(), search.read_summary()
    for stored in (summary, {} if study is None else study.user_attrs.get(IDENTITY, {})):
        for part in ("space", "direction", "metric", "objective", "budget"):
            if part in wanted and stored.get(part, wanted[part]) != wanted[part]:
                return f"its {part} is {stored[part]}, not {wanted[part]}"
        if found := find_other_way(stored, {**search.plan.way, "seed": search.plan.base.seed}):
            return f"it was made with {found}"
    if search.is_summarised and summary.get("best", {}).get("values", {}).keys() != wanted["space"].keys():
        return "its summary has other values than those searched"
    return ""


def _read_content(search: Search) -> dict[str, Any]:
    """A summary, or where it is not written yet the same of its study: the content of the data that it was made on."""
    study = search.load_study()
    return search.read_summary() or {"content": {} if study is None else study.user_attrs.get(CONTENT, {})}


def delete_stale(searches: Sequence[Search]) -> None:
    """Delete those of `searches` that are still to be made anew: another call may have begun them meanwhile."""
    for one in searches:
        if find_staleness(one):
            delete_search(one)


def delete_search(search: Search) -> None:
    """Delete the study and the summary of a search; the records of its trials stay, except those of other data.

    A record of the same settings saves the new search a trial, but one of other data would be refused, and so would the
    checkpoints of a stopped trial.
    """
    found = read_fingerprint(search.plan)
    # The records first: after an interruption, the study still says that it is another one.
    for path in sorted(search.plan.base.record_path.parent.glob("*.json")):
        if found is not None and _read_data(path) not in (None, found):
            path.unlink()
            predictions_path(path).unlink(missing_ok=True)
    if found is not None:
        delete_checkpoints_of_other_data(search.plan.base, found, list(_list_keys(search)))
    if search.load_study() is not None:
        delete(open_store(search.plan.sweep.storage), search.study)
    search.summary.unlink(missing_ok=True)


def _list_keys(search: Search) -> Iterator[str]:
    """The keys of the runs of a stored study that the new one may try again."""
    study = search.load_study()
    for trial in study.get_trials(deepcopy=False) if study else []:
        with suppress(UserError):  # of other settings: it has other keys
            yield search.plan.trial_config(trial.params).key


def _read_data(record: Path) -> str | None:
    """The fingerprint of the data of a record; None if it does not say, or is damaged, which its run will report."""
    try:
        return content_of(read_record(record)).get("data")
    except ResourceError:  # it may be of other data, so that the new search would be refused
        raise
    except UserError:
        return None


def _read_fixed(search: Search) -> list[dict[str, Any]]:
    """What all trials of the stored study share; empty without a study."""
    study = search.load_study()
    return [] if study is None else [study.user_attrs.get(IDENTITY, {}).get("fixed", {})]


def _read_defaults(search: Search) -> dict[str, Any]:
    """The settings of the method without those of the command line."""
    usual = [one for one in search.overrides if not key_of(one).startswith("method.")]
    composed = compose_sweep(usual) if len(usual) < len(search.overrides) else search.plan.composed
    return read_settings(composed, search.plan.base.seed)
