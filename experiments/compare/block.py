"""The runs of a comparison on disk, with those of other plans that are the very same runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.report.collect import Store
from experiments.report.departures import find_departures
from experiments.report.evidence import Block, Evidence, add_record, load_evidence
from experiments.report.plans import Plan, read_plan
from experiments.report.tables.base import Context
from sparsegrad.errors import UserError

SHARED = ("evidence_mlp_only", "evidence_smollm2")  # their protocol is the comparison's


def load_comparison(context: Context, folder: str) -> Evidence:
    """The evidence with the block of a comparison in it, so that its gates find full fine-tuning's runs.

    Raises:
        UserError: if the plan is gone, or its `evidence` is not allowed.
    """
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"conf/experiment/{folder}.yaml is missing: restore it from the repository")
    plan = replace(plan, grid={**plan.grid, "method": _list_names(context.store, plan)})
    block = Block(folder, plan)
    plans: dict[str, Plan | None] = {folder: plan}
    for place, record in sorted(context.store.records.items()):
        if place.parts[0] == folder or (place.parts[0] in SHARED and _is_same(record, plan)):
            add_record(context, block, plans, place, record)
    block.runs = {key: runs for key, runs in block.runs.items() if runs}
    return Evidence({**load_evidence(context).blocks, folder: block})


def _list_names(store: Store, plan: Plan) -> tuple[str, ...]:
    """Names of the methods: of the plan, whose options may lie in a folder (`peft/dora`), and of the runs.

    METHODS takes any method, so none is a departure from the plan.
    """
    planned = [one.rpartition("/")[2] for one in plan.grid.get("method", ())]
    run = [
        str(one["config"]["method"]["name"]) for place, one in store.records.items() if place.parts[0] == plan.folder
    ]
    return tuple(dict.fromkeys([*planned, *run]))


def _is_same(record: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a run of another plan does all that this plan says."""
    return (
        record.get("status") == "complete"
        and record["config"]["task"]["name"] in plan.tasks
        and not find_departures(record, plan)
    )
