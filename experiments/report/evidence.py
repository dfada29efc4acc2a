"""The evidence runs on disk, by plan, arm, task and seed; and what is apart from them, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.report.arms import arm_of
from experiments.report.blocks import BLOCKS, describe_repeat
from experiments.report.departures import find_departures
from experiments.report.plans import EvidencePlan, read_plan
from experiments.report.repeats import settle_runs
from experiments.report.resampling import LOWER_IS_BETTER, POINTS, Remembered, scores
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches, is_number
from experiments.report.stats import Difference, compare
from experiments.report.tables.base import Context
from sparsegrad.errors import DIVERGED, ResourceError, UserError
from sparsegrad.runs.predictions import AGAIN, read_predictions, smallest_float
from sparsegrad.runs.records import PRUNED

_ROUNDING, _ROUNDING_OF_LOSS = 0.05, 0.005  # points and nats: predictions are stored with fewer digits than scores
LEFT_OUT = "left out, "  # begins the reason of a record whose predictions are not its own


@dataclass
class Evidence:
    """All blocks, and the comparisons made so far, which tables, figures and claims share."""

    blocks: dict[str, Block]
    compared: dict[tuple[Any, ...], Difference | None] = field(default_factory=dict)

    def compare(self, folder: str, a: str, b: str | None, tasks: Sequence[str]) -> Difference | None:
        """The paired difference of two arms over tasks, or the score of one arm."""
        key = (folder, a, b, tuple(tasks))
        if key not in self.compared:
            block = self.blocks[folder]
            metrics = {task: block.metric(task) for task in tasks}
            other = None if b is None else block.seeded(b, tasks)
            fewest = block.fewest_seeds
            self.compared[key] = compare(metrics, block.seeded(a, tasks), other, fewest) if metrics else None
        return self.compared[key]


def load_evidence(context: Context) -> Evidence:
    """The evidence runs below results/runs; read once for each context.

    Raises:
        UserError: for a plan whose `evidence` is not allowed.
    """
    cache = context.store.cache
    if "evidence" not in cache:
        cache["evidence"] = Evidence({folder: _load_block(context, folder) for folder in BLOCKS})
    found: Evidence = cache["evidence"]
    return found


def _load_block(context: Context, folder: str) -> Block:
    block = Block(folder, read_plan(folder))
    plans: dict[str, EvidencePlan | None] = {folder: block.plan}
    for place, record in sorted(context.store.records.items()):
        if place.parts[0] != folder:
            continue
        own = _find_plan(record, plans)
        if own is not None and own.experiment != folder:
            block.apart.append(f"{place}: exploratory, made by another plan ({own.experiment})")
        else:
            add_record(context, block, plans, place, record)
    settle_runs(block, Searches(context.results))
    return block


def add_record(
    context: Context, block: Block, plans: dict[str, EvidencePlan | None], place: Path, record: Mapping[str, Any]
) -> None:
    """Sort one record into `found`, `failed` or `apart`."""
    if (reason := _why_failed(record)) is not None:
        if not reason.startswith(PRUNED):
            arm = arm_of(record["config"], _find_plan(record, plans) or block.plan)
            key = arm, str(record["config"]["task"]["name"])
            seeds, seed = block.failed.setdefault(key, {}), int(record["config"]["seed"])
            # One that would not count if it had a score says nothing of the plan.
            if why := _why_exploratory(record, _find_plan(record, plans)):
                reason = f"exploratory, {why}"
            seeds[seed] = "; ".join(dict.fromkeys(filter(None, (seeds.get(seed), reason))))
        return
    found = judge_record(context.results, block.plan, plans, place, record)
    if isinstance(found, str):
        block.apart.append(f"{place}: {found}")
    else:
        block.found.setdefault((found.arm, found.task), []).append(found)


def _why_failed(record: Mapping[str, Any]) -> str | None:
    """Why a record has no score; None if it has one."""
    if record["status"] != "complete":
        return str(record.get("reason", ""))
    return None if is_number(_result_of(record).get("value")) else f"its score is not a finite number: it {DIVERGED}"


def _result_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("result") or {}


def judge_record(
    results: Path,
    plan: EvidencePlan | None,
    plans: dict[str, EvidencePlan | None],
    place: Path,
    record: Mapping[str, Any],
) -> EvidenceRun | str:
    """The run of a complete record, or why it does not count.

    Args:
        results: the results folder.
        plan: that of the table, which names the arm of a record without a plan.
        plans: the plans read so far, by name.
        place: path of the record below results/runs.
        record: its content.

    Raises:
        ResourceError: when the disk does not let its predictions be read, which says nothing about them.
    """
    own = _find_plan(record, plans)
    if why := _why_exploratory(record, own):
        return f"exploratory, {why}"
    again = describe_repeat(place.parts[0], int(record["config"]["seed"]))
    try:
        arrays = _read_arrays(results / "runs" / place, record)
    except ResourceError:
        raise
    except UserError as error:
        return f"{LEFT_OUT}{str(error).replace(AGAIN, again)}"
    config, result = record["config"], _result_of(record)
    if not is_number(result.get("value")):
        return "its score is not a finite number"
    if "metric" not in result:
        return f"{LEFT_OUT}its score has no metric: {again}"
    score = float(result["value"]) * (1.0 if result["metric"] in LOWER_IS_BETTER else POINTS)
    arm, task = arm_of(config, own or plan), str(config["task"]["name"])
    found = EvidenceRun(place, record, arm, task, int(config["seed"]), round(score, 6), arrays)
    return found if _is_score_of(found) else f"{LEFT_OUT}its score is not that of its predictions: {again}"


def _read_arrays(path: Path, record: Mapping[str, Any]) -> Remembered:
    arrays = Remembered(read_predictions(path, record))
    label = arrays.get("label")
    if label is not None and label.dtype.kind == "f":
        # Earlier versions stored labels in the type of the predictions; rows are paired by labels of one type.
        arrays["label"] = label.astype(smallest_float(label))
    return arrays


def _is_score_of(run: EvidenceRun) -> bool:
    """Whether a score is that of the predictions; both decide, the one gates and the other differences."""
    if run.has_collapsed:  # it voids its task; where predictions are not finite there is nothing to compare with
        return True
    tolerance = _ROUNDING_OF_LOSS if run.metric in LOWER_IS_BETTER else _ROUNDING
    return abs(float(scores(run.metric, [run.arrays])[0]) - run.score) <= tolerance


def _find_plan(record: Mapping[str, Any], plans: dict[str, EvidencePlan | None]) -> EvidencePlan | None:
    """The plan that a record names, as it is now."""
    name = (record.get("plan") or {}).get("experiment")
    if name and name not in plans:
        plans[name] = read_plan(str(name))
    return plans.get(name) if name else None


def _why_exploratory(record: Mapping[str, Any], plan: EvidencePlan | None) -> str:
    """Why a record is no evidence; empty if it is."""
    about = record.get("plan") or {}
    if not about.get("experiment"):
        return "made without a plan"
    if plan is None:
        return f"its plan {about['experiment']} no longer exists"
    if plan.sha256 != about.get("sha256"):
        return f"its plan {plan.experiment} was edited afterwards"
    if plan.exploratory:
        return f"its plan {plan.experiment} says so"
    other = find_departures(record, plan)
    return f"not as its plan {plan.experiment} says: {', '.join(other)}" if other else ""
