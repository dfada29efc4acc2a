"""The evidence runs on disk, by plan, arm, task and seed; and what is apart from them, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.palette import order_of
from experiments.report.arms import arm_of
from experiments.report.collect import hours
from experiments.report.departures import find_departures
from experiments.report.plans import Plan, read_plan
from experiments.report.resampling import LOWER_IS_BETTER, POINTS, Remembered, is_constant
from experiments.report.stats import Difference, Seeded, compare
from experiments.report.tables.base import Context
from sparsegrad.errors import UserError
from sparsegrad.runs.predictions import Arrays, read_predictions
from sparsegrad.runs.records import PRUNED

_RISE = 0.5  # points that a run must gain in its last three evaluations to count as still improving; of a loss, percent


@dataclass(frozen=True)
class About:
    """How a block is named: title of its table, short name, and its number for `make evidence`."""

    title: str
    short: str
    number: str


# Folder below results/runs, which is the name of its plan, too.
BLOCKS = {
    "evidence_paper": About("All methods, the paper's regime, MiniLM", "MiniLM", "2a"),
    "evidence_mlp_only": About("All methods, MLP weights and head alone, MiniLM", "MiniLM, MLP only", "3"),
    "evidence_base": About("Base size, the paper's regime, MPNet-base", "MPNet-base", "5"),
    "evidence_density": About("Number of kept entries, MLP weights and head alone, MiniLM", "kept entries", "4"),
    "evidence_basis": About(
        "HOSVD's basis, the authors', a random one and none, MLP weights and head alone, MiniLM", "bases", "4"
    ),
    "evidence_smollm2": About("Language model, validation loss, SmolLM2", "SmolLM2", "6"),
    "evidence_gates": About("Health gates: full fine-tuning at several rates, MiniLM", "gates", "0"),
}
# Table of the paper -> block that has the same comparison on a small model.
IN_SMALL = {
    **dict.fromkeys(("table4", "table5", "table9", "table10"), "evidence_paper"),
    **dict.fromkeys(("table11", "table12"), "evidence_density"),
}


@dataclass(frozen=True)
class EvidenceRun:
    """One complete run of a plan; `score` in points (nll: as it is)."""

    path: Path
    record: Mapping[str, Any]
    arm: str
    task: str
    seed: int
    score: float
    arrays: Arrays

    @property
    def metric(self) -> str:
        """The task's main metric."""
        return str(self.record["result"]["metric"])

    @property
    def is_constant(self) -> bool:
        """Whether it predicts the same for all rows."""
        return is_constant(self.metric, self.arrays)

    @property
    def hours(self) -> float | None:
        """Training hours: its steps at its own steps/s, or the wall clock without them."""
        rate = self.record.get("speed", {}).get("steps_per_second")
        return self.record["result"]["steps"] / rate / 3600 if rate else hours(self.record)

    @property
    def still_improving(self) -> bool:
        """Whether its best evaluation is the last one, and better than those before the last three by `_RISE`.

        On a plateau the last evaluation is sometimes the best by a hair, which more training would not change.
        """
        rows = self._evaluations()
        if len(rows) < 2 or self.record["result"].get("chosen_step") != rows[-1][0]:
            return False
        best = min if self.metric in LOWER_IS_BETTER else max
        earlier, last = best(score for _, score in rows[:-3] or rows[:-1]), rows[-1][1]
        return abs(last - earlier) > (_RISE * last / POINTS if self.metric in LOWER_IS_BETTER else _RISE)

    @property
    def chosen_score(self) -> float:
        """The best score on the rows that choose the checkpoint."""
        best = min if self.metric in LOWER_IS_BETTER else max
        return best((score for _, score in self._evaluations()), default=float("nan"))

    def reaches(self, target: float) -> bool:
        """Whether an evaluation reaches a score."""
        return any(score >= target for _, score in self._evaluations())

    def hours_until(self, target: float) -> float | None:
        """Hours until an evaluation first reaches a score; None if none does, or the run has no steps/s."""
        rate = self.record.get("speed", {}).get("steps_per_second")
        step = next((step for step, score in self._evaluations() if score >= target), None)
        return None if step is None or not rate else step / rate / 3600

    def _evaluations(self) -> list[tuple[int, float]]:
        """(step, points) of each evaluation on the rows that choose the checkpoint."""
        scale = 1.0 if self.metric in LOWER_IS_BETTER else POINTS
        rows = self.record.get("evaluations", [])
        return [(row["step"], scale * row[self.metric]) for row in rows if row.get(self.metric) is not None]


@dataclass
class Block:
    """The runs of one folder.

    Attributes:
        folder: its name.
        plan: the plan of the same name; None without one.
        runs: (arm, task) -> seed -> run, of plans as they are now.
        apart: one line for each record that does not count, with the reason.
        failed: (arm, task) -> reasons of runs that failed.
    """

    folder: str
    plan: Plan | None
    runs: dict[tuple[str, str], dict[int, EvidenceRun]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    failed: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Arms with runs, in the order of figures and tables."""
        return sorted({arm for arm, _ in self.runs}, key=order_of)

    @property
    def tasks(self) -> list[str]:
        """Tasks with runs, those of the plan first."""
        found = {task for _, task in self.runs}
        planned = [task for task in (self.plan.tasks if self.plan else ()) if task in found]
        return [*planned, *sorted(found - set(planned))]

    def of(self, arm: str, task: str) -> dict[int, EvidenceRun]:
        """Seed -> run."""
        return self.runs.get((arm, task), {})

    def metric(self, task: str) -> str:
        """The metric of a task that has runs."""
        return next(run.metric for (_, of), runs in self.runs.items() if of == task for run in runs.values())

    def all_runs(self, task: str | None = None) -> Iterator[EvidenceRun]:
        """Every run, or those of one task."""
        for (_, of), runs in sorted(self.runs.items()):
            if task in (None, of):
                yield from (runs[seed] for seed in sorted(runs))

    def scores(self, arm: str, task: str) -> list[float]:
        """Scores in order of seeds."""
        return [run.score for _, run in sorted(self.of(arm, task).items())]

    def is_floor(self, arm: str) -> bool:
        """Whether the plan shows this arm only to read the others by."""
        return self.plan is not None and arm.partition(" ")[0] in self.plan.floors

    def averages(self, arm: str, tasks: Sequence[str]) -> list[float]:
        """Mean over tasks for each seed that has all of them."""
        common = set.intersection(*(set(self.of(arm, task)) for task in tasks)) if tasks else set()
        return [mean(self.of(arm, task)[seed].score for task in tasks) for seed in sorted(common)]

    def seeded(self, arm: str, tasks: Sequence[str]) -> dict[str, Seeded]:
        """Task -> seed -> predictions."""
        return {task: {seed: run.arrays for seed, run in self.of(arm, task).items()} for task in tasks}


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
            self.compared[key] = compare(metrics, block.seeded(a, tasks), other) if metrics else None
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
    plans: dict[str, Plan | None] = {folder: block.plan}
    for place, record in sorted(context.store.records.items()):
        if place.parts[0] == folder:
            add_record(context, block, plans, place, record)
    for key, runs in block.runs.items():
        if not runs:
            block.apart.append(f"{' '.join(key)}: no run counts")
    block.runs = {key: runs for key, runs in block.runs.items() if runs}
    return block


def add_record(
    context: Context, block: Block, plans: dict[str, Plan | None], place: Path, record: Mapping[str, Any]
) -> None:
    """Sort one record into `runs`, `failed` or `apart`."""
    if record["status"] != "complete":
        if not (reason := str(record.get("reason", ""))).startswith(PRUNED):
            arm = arm_of(record["config"], _find_plan(record, plans) or block.plan)
            key = arm, str(record["config"]["task"]["name"])
            block.failed.setdefault(key, []).append(f"seed {record['config']['seed']}: {reason}")
        return
    found = judge_record(context.results, block.plan, plans, place, record)
    if isinstance(found, str):
        block.apart.append(f"{place}: {found}")
    else:
        _put_run(block, found)


def judge_record(
    results: Path, plan: Plan | None, plans: dict[str, Plan | None], place: Path, record: Mapping[str, Any]
) -> EvidenceRun | str:
    """The run of a complete record, or why it does not count.

    Args:
        results: the results folder.
        plan: that of the table, which names the arm of a record without a plan.
        plans: the plans read so far, by name.
        place: path of the record below results/runs.
        record: its content.
    """
    own = _find_plan(record, plans)
    if why := _why_exploratory(record, own):
        return f"exploratory, {why}"
    try:
        arrays = Remembered(read_predictions(results / "runs" / place, record))
    except UserError as error:
        return f"left out, {error}"
    config, result = record["config"], record["result"]
    score = float(result["value"] or 0.0) * (1.0 if result["metric"] in LOWER_IS_BETTER else POINTS)
    arm, task = arm_of(config, own or plan), str(config["task"]["name"])
    return EvidenceRun(place, record, arm, task, int(config["seed"]), round(score, 6), arrays)


def _put_run(block: Block, run: EvidenceRun) -> None:
    """Add a run; two runs of one seed contradict each other, so neither counts."""
    runs = block.runs.setdefault((run.arm, run.task), {})
    twice = f"{run.arm} {run.task} seed {run.seed}: two records"
    if any(line.startswith(twice) for line in block.apart):
        return
    if (other := runs.pop(run.seed, None)) is not None:
        block.apart.append(f"{twice} ({other.path.name}, {run.path.name}): delete the wrong one")
        return
    runs[run.seed] = run


def _find_plan(record: Mapping[str, Any], plans: dict[str, Plan | None]) -> Plan | None:
    """The plan that a record names, as it is now."""
    name = (record.get("plan") or {}).get("experiment")
    if name and name not in plans:
        plans[name] = read_plan(str(name))
    return plans.get(name) if name else None


def _why_exploratory(record: Mapping[str, Any], plan: Plan | None) -> str:
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
