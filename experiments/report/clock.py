"""Hours of training at one speed for all methods, because runs of a block may come from several machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from experiments.report.evidence import Evidence
from experiments.report.gates import reference_runs
from experiments.report.plans import REGIMES
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches, machine_of
from experiments.report.tables.costs import Cost

# Arm -> arm of the benchmark.
BENCHED = {
    "full": "full",
    "lora": "lora_peft",
    "lora_tuned": "lora_peft",
    "lora_authors": "lora_peft",
    "meprop": "meprop",
    "sparsegrad": "exact",
    "sparsegrad_small": "exact_small",
    "sparsegrad_authors": "authors",
    "sparsegrad_fast": "fast",
}
BENCHED_MODEL = "minilm"
TARGET = 1.0  # points below full fine-tuning's score
AT_BENCHMARK = (
    "Hours: steps at the benchmark's steps/s (in float32, with batches of another shape), because the runs are from "
    "several machines. So these hours compare methods on the benchmark's machine; the runs themselves took longer or "
    "shorter."
)
AT_RUNS = (
    "Hours: of the machine of the runs, which they shared, so they are rough. Searches that were made on another "
    "machine have none."
)
AT_NOTHING = "No hours: the runs are from several machines, and the benchmark lacks some of the arms."


@dataclass(frozen=True)
class Clock:
    """What a step of each arm takes.

    Attributes:
        speeds: arm -> steps/s of the benchmark; None: each run at its own speed.
        is_known: False if the runs' own speeds cannot be compared either; nothing has hours then.
        about: what the hours are, for the notes of a table.
    """

    speeds: Mapping[str, float] | None
    is_known: bool
    about: str

    def speed_of(self, run: EvidenceRun) -> float | None:
        """Steps/s; None where it was not measured."""
        if not self.is_known:
            return None
        return run.speed if self.speeds is None else self.speeds[run.arm]

    def hours(self, run: EvidenceRun, steps: int | None) -> float | None:
        """Hours of some steps of a run."""
        speed = self.speed_of(run)
        return None if steps is None or not speed else steps / speed / 3600

    def search_hours(self, arm: str, runs: Sequence[EvidenceRun], searches: Searches) -> float | None:
        """Hours of all trials of the searches behind some runs of an arm; without a benchmark, on the runs' machine."""
        if self.speeds is not None:
            steps = searches.count_steps(runs)
            return None if steps is None else steps / self.speeds[arm] / 3600
        behind = searches.of_runs(runs)
        machines = {machine_of(run.record) for run in runs} | set(map(searches.machines_of, behind))
        return sum(search.hours for search in behind) if self.is_known and behind and len(machines) == 1 else None


def make_clock(block: Block, costs: Mapping[str, Cost]) -> Clock:
    """The benchmark's speeds where it has all arms, else those of the runs if they are from one machine."""
    found = {arm: costs[BENCHED[arm]].speed for arm in block.arms if BENCHED.get(arm) in costs}
    if is_benched(block) and len(found) == len(block.arms):
        return Clock(found, True, AT_BENCHMARK)
    if len({machine_of(run.record) for run in block.all_runs()}) == 1:
        return Clock(None, True, AT_RUNS)
    return Clock(None, False, AT_NOTHING)


def is_benched(block: Block) -> bool:
    """Whether the benchmark has this model and regime."""
    models = {run.record["config"]["model"]["name"] for run in block.all_runs()}
    return models == {BENCHED_MODEL} and (block.plan is None or REGIMES[block.plan.regime])


def training_hours(block: Block, arm: str, tasks: Sequence[str], clock: Clock) -> float | None:
    """Hours of one seed over these tasks: the sum of the means over seeds; None if a task has no times."""
    total = 0.0
    for task in tasks:
        runs = block.of(arm, task).values()
        spent = [hours for run in runs if (hours := clock.hours(run, run.steps)) is not None]
        if not spent:
            return None
        total += mean(spent)
    return total if tasks else None


@dataclass(frozen=True)
class TargetTime:
    """Hours over tasks until a target score, the sum of the means over seeds; None if a task has none.

    Attributes:
        hours: the sum.
        missed: tasks on which some seed does not reach the target, with their number: "1 of 3 seeds (stsb)".
        unknown: tasks on which all seeds reach it, but some at an unknown time, because its speed was not measured.
    """

    hours: float | None = None
    missed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def hours_to_target(evidence: Evidence, block: Block, arm: str, tasks: Sequence[str], clock: Clock) -> TargetTime:
    """Hours over these tasks until full fine-tuning's held-out score minus one point is first reached."""
    total, missed, unknown = 0.0, [], []
    method = block.plan.gate_method if block.plan else "full"
    for task in tasks:
        references = reference_runs(evidence, block.folder, task, method)
        runs = block.of(arm, task).values()
        if not runs or not references or block.metric(task) in LOWER_IS_BETTER:
            return TargetTime()
        target = mean(run.chosen_score for run in references) - TARGET
        times = [hours for run in runs if (hours := clock.hours(run, run.steps_until(target))) is not None]
        if missing := sum(run.steps_until(target) is None for run in runs):
            missed.append(f"{missing} of {len(runs)} seeds ({task})")
        elif len(times) < len(runs):
            unknown.append(task)
        else:
            total += mean(times)
    found = tasks and not missed and not unknown
    return TargetTime(total if found else None, tuple(missed), tuple(unknown))
