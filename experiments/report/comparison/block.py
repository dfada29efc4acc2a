"""The runs of a comparison on disk, with those of other plans that are the very same runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.report.collect import Store
from experiments.report.departures import find_departures
from experiments.report.evidence import Evidence, add_record, judge_record, load_evidence
from experiments.report.plans import EvidencePlan, read_plan
from experiments.report.repeats import settle_runs
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches
from experiments.report.tables.base import Context
from sparsegrad.errors import UserError
from sparsegrad.runs.records import find_complete

SHARED = ("evidence_mlp_only", "evidence_smollm2")  # their protocol is the comparison's

Plans = dict[str, EvidencePlan | None]


def load_comparison(context: Context, folder: str) -> Evidence:
    """The evidence with the block of a comparison in it, so that its gates find full fine-tuning's runs.

    Raises:
        UserError: if the plan is gone, or its `evidence` is not allowed.
    """
    plan = _read_existing(folder)
    plan = replace(plan, grid={**plan.grid, "method": _list_names(plan, context.store)})
    block = Block(folder, plan)
    plans: Plans = {folder: plan}
    for place, record in _choose_records(context, plan, plans):
        add_record(context, block, plans, place, record)
    settle_runs(block, Searches(context.results))
    return Evidence({**load_evidence(context).blocks, folder: block})


def find_shared(results: Path, folder: str, key: str) -> Path | None:
    """The record of another plan that the table of a comparison counts as its run `key`; None if there is none.

    Raises:
        UserError: as `load_comparison`.
    """
    plan = _read_existing(folder)
    plan = replace(plan, grid={**plan.grid, "method": _list_names(plan)})
    plans: Plans = {folder: plan}
    for other in SHARED:
        place = Path(other) / f"{key}.json"
        record = find_complete(results / "runs" / place)
        if record is not None and _is_same(record, plan) and _counts(results, plan, plans, place, record):
            return place
    return None


def _read_existing(folder: str) -> EvidencePlan:
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"conf/experiment/{folder}.yaml is missing: restore it from the repository")
    return plan


def _list_names(plan: EvidencePlan, store: Store | None = None) -> tuple[str, ...]:
    """Names of the methods: of the plan, whose options may be in a folder (`peft/dora`), and of its runs.

    METHODS takes any method, so none is a departure from the plan.
    """
    planned = [one.rpartition("/")[2] for one in plan.grid.get("method", ())]
    records = store.records if store is not None else {}
    run = [str(one["config"]["method"]["name"]) for place, one in records.items() if place.parts[0] == plan.folder]
    return tuple(dict.fromkeys([*planned, *run]))


def _choose_records(context: Context, plan: EvidencePlan, plans: Plans) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """One record for each key: the key covers all that determines a result, so two records are the same run.

    The first one that counts is chosen, in the plan's own folder before others.
    """
    found: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder in (plan.folder, *SHARED):
        for place, record in sorted(context.store.records.items()):
            if place.parts[0] == folder and (folder == plan.folder or _is_same(record, plan)):
                found.setdefault(place.stem, []).append((place, record))
    for same in found.values():
        counting = (one for one in same if _counts(context.results, plan, plans, *one))
        yield next(counting, same[0])


def _counts(results: Path, plan: EvidencePlan, plans: Plans, place: Path, record: Mapping[str, Any]) -> bool:
    if record["status"] != "complete":
        return False
    return isinstance(judge_record(results, plan, plans, place, record), EvidenceRun)


def _is_same(record: Mapping[str, Any], plan: EvidencePlan) -> bool:
    """Whether a run of another plan does all that this plan says."""
    return (
        record.get("status") == "complete"
        and record["config"]["task"]["name"] in plan.tasks
        and not find_departures(record, plan)
    )
