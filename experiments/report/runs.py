"""One run of the evidence, and the runs of one folder by arm, task and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.palette import order_of
from experiments.report.plans import MIN_SEEDS, EvidencePlan
from experiments.report.resampling import LOWER_IS_BETTER, POINTS, has_collapsed
from experiments.report.stats import Seeded, Summary
from sparsegrad.runs.predictions import Arrays

_RISE = 0.5  # points that a run must gain at its end to count as still improving; of a loss, percent
_END = 3  # evaluations in which it gains them at a constant rate


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
    def rate(self) -> float:
        """The learning rate; nan if the record has none."""
        return float(self.record["config"].get("train", {}).get("lr") or "nan")

    @property
    def finished(self) -> str:
        """Day on which it finished; empty if the record has none."""
        return str(self.record.get("environment", {}).get("finished") or "")[:10]

    @property
    def has_collapsed(self) -> bool:
        """Whether it predicts one class, or numbers that hardly differ, for all rows."""
        return has_collapsed(self.metric, self.arrays)

    @property
    def steps(self) -> int:
        """Number of its training steps."""
        return int(self.record["result"]["steps"])

    @property
    def speed(self) -> float | None:
        """Its own steps/s; None where it was not measured."""
        return self.record.get("speed", {}).get("steps_per_second") or None

    @property
    def still_improving(self) -> bool:
        """Whether its best evaluation is the last one, and better than earlier ones by `_RISE`.

        At a constant rate, these are the ones before the last three: single evaluations swing, and on a plateau the
        last one is sometimes the best by a hair. A rate that falls to 0 ends the swinging, which raises the score of
        the last quarter whatever the length of the run; so there, all earlier evaluations count.
        """
        rows = self._evaluations()
        if len(rows) < 2 or self.record["result"].get("chosen_step") != rows[-1][0]:
            return False
        gain = self._gain_over(rows[:-1] if self._rate_falls else rows[:-_END] or rows[:-1])
        needed = _RISE * rows[-1][1] / POINTS if self.metric in LOWER_IS_BETTER else _RISE
        return gain > needed

    @property
    def gain_at_end(self) -> float | None:
        """Points by which the last evaluation is better than the best before the last three; None without so many."""
        rows = self._evaluations()
        return self._gain_over(rows[:-_END]) if len(rows) > _END else None

    def _gain_over(self, earlier: Sequence[tuple[int, float]]) -> float:
        last, scores = self._evaluations()[-1][1], [score for _, score in earlier]
        return min(scores) - last if self.metric in LOWER_IS_BETTER else last - max(scores)

    @property
    def _rate_falls(self) -> bool:
        return bool(self.record["config"].get("train", {}).get("schedule", "constant") != "constant")

    @property
    def chosen_score(self) -> float:
        """The best score on the rows that choose the checkpoint."""
        best = min if self.metric in LOWER_IS_BETTER else max
        return best((score for _, score in self._evaluations()), default=float("nan"))

    def steps_until(self, target: float) -> int | None:
        """Steps until an evaluation first reaches a score; None if none does."""
        return next((step for step, score in self._evaluations() if score >= target), None)

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
        found: (arm, task) -> runs of plans as they are now, in the order of their paths.
        runs: (arm, task) -> seed -> the one of them that counts.
        apart: one line for each record that does not count, with the reason.
        failed: (arm, task) -> seed -> why its run failed.
    """

    folder: str
    plan: EvidencePlan | None
    found: dict[tuple[str, str], list[EvidenceRun]] = field(default_factory=dict)
    runs: dict[tuple[str, str], dict[int, EvidenceRun]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    failed: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)

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

    def runs_of(self, arm: str) -> list[EvidenceRun]:
        """The runs of an arm on all tasks."""
        return [run for task in self.tasks for run in self.of(arm, task).values()]

    def failures(self, arm: str, task: str) -> dict[int, str]:
        """Seed -> why it failed, of seeds without a run that counts."""
        return {seed: why for seed, why in self.failed.get((arm, task), {}).items() if seed not in self.of(arm, task)}

    @property
    def fewest_seeds(self) -> int:
        """Fewest common seeds from which a difference has an interval."""
        return self.plan.fewest_seeds if self.plan else MIN_SEEDS

    def tasks_of(self, arm: str, other: str | None, tasks: Sequence[str]) -> list[str]:
        """The tasks on which an arm, or two arms together, have enough seeds; if none, those on which they have any.

        A task whose runs have just begun would otherwise take the interval from tasks that are complete.
        """
        seeds = {task: set(self.of(arm, task)) & set(self.of(arm if other is None else other, task)) for task in tasks}
        enough = [task for task in tasks if len(seeds[task]) >= self.fewest_seeds]
        return enough or [task for task in tasks if seeds[task]]

    def metric(self, task: str) -> str:
        """The metric of a task that has runs."""
        return next(run.metric for (_, of), runs in self.runs.items() if of == task for run in runs.values())

    @property
    def is_loss(self) -> bool:
        """Whether its scores are losses, of which lower ones are better."""
        return any(self.metric(task) in LOWER_IS_BETTER for task in self.tasks)

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

    def average(self, arm: str, tasks: Sequence[str]) -> Summary | None:
        """Mean over tasks of their means over all seeds, as in differences; None if a task has no run.

        Its std is over the seeds that have all tasks, its count that of the task with the fewest.
        """
        scores = [self.scores(arm, task) for task in tasks]
        if not scores or not all(scores):
            return None
        common = self.averages(arm, tasks)
        return Summary(mean(map(mean, scores)), stdev(common) if len(common) > 1 else None, min(map(len, scores)))

    def averages(self, arm: str, tasks: Sequence[str]) -> list[float]:
        """Mean over tasks for each seed that has all of them."""
        common = set.intersection(*(set(self.of(arm, task)) for task in tasks)) if tasks else set()
        return [mean(self.of(arm, task)[seed].score for task in tasks) for seed in sorted(common)]

    def seeded(self, arm: str, tasks: Sequence[str]) -> dict[str, Seeded]:
        """Task -> seed -> predictions."""
        return {task: {seed: run.arrays for seed, run in self.of(arm, task).items()} for task in tasks}
