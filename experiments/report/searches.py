"""The searches behind the evidence runs: trials, hours and best values, from the summaries in results/studies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from experiments.report.runs import EvidenceRun
from experiments.report.tables.hyperparams import summaries
from sparsegrad.errors import UserError
from sparsegrad.runs.environment import list_processes, read_device_name
from sparsegrad.runs.records import read_record
from sparsegrad.sweeps.search_results import KEY as RATE
from sparsegrad.sweeps.search_way import describe_setting

# What the searches of all methods have in common, besides their budget.
ALIKE = ("sampler", "pruner", "space", "direction", "seed")
CURRENT = ""  # a run whose values are those of its search as it is now


@dataclass(frozen=True)
class Search:
    """One study: its finished trials, their hours, the values of the best one, and the evaluations of these trials.

    `alike` has those of `ALIKE` that its summary says; earlier ones say fewer. `is_at_edge`: whether the best rate
    is the smallest or largest of those tried.
    """

    study: str
    trials: int
    hours: float
    values: Mapping[str, float]
    evaluations: int | None = None
    alike: Mapping[str, str] = field(default_factory=dict)
    is_at_edge: bool = False


class Searches:
    """All studies of a results folder, by name."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._found = {str(one["study"]): _read_search(one, results) for one in summaries(results)}

    def of_run(self, run: EvidenceRun) -> Search | None:
        """The search that gave a run its rate; None for a run without one, or if its summary is gone."""
        return self._found.get(study_of(run))

    def trials_of(self, run: EvidenceRun) -> int | None:
        """Finished trials of the search that gave a run its rate; if its summary is gone, the budget in the record."""
        if (search := self.of_run(run)) is not None:
            return search.trials
        budget = (run.record.get("hparams") or {}).get("budget")
        return int(budget) if is_number(budget) else None

    def describe_change(self, run: EvidenceRun) -> str | None:
        """How the values that a run took from its search differ from those that the search gives now.

        Returns:
            `CURRENT` if they are the same; None if that is not known.
        """
        about, search = run.record.get("hparams") or {}, self.of_run(run)
        if search is None:
            return None
        if is_number(before := about.get("ratio_to_full")):
            return self._describe_ratio(run, search, before)
        shared = [key for key in search.values if is_number(about.get(key))]
        other = [key for key in shared if about[key] != search.values[key]]
        if not shared:
            return None
        return ", ".join(f"{_name_value(key)} {about[key]:g}, now {search.values[key]:g}" for key in other)

    def _describe_ratio(self, run: EvidenceRun, search: Search, before: float) -> str | None:
        """As `describe_change`, of a run whose rate is carried over from another model by its ratio to `full`'s."""
        method = str(run.record["config"]["method"]["name"])
        full = self._found.get(search.study.replace(f"-{method}-", "-full-"))
        if full is None or RATE not in search.values or not full.values.get(RATE):
            return None
        ratio = round(search.values[RATE] / full.values[RATE], 4)
        return CURRENT if ratio == before else f"{before:g} times the rate of full fine-tuning, now {ratio:g}"

    def of_runs(self, runs: Iterable[EvidenceRun]) -> list[Search]:
        """The different searches behind several runs."""
        found = (self.of_run(run) for run in runs)
        return list({one.study: one for one in found if one is not None}.values())

    def count_steps(self, runs: Iterable[EvidenceRun]) -> int | None:
        """Steps that the finished trials of the searches behind several runs trained; None if that is not known.

        A run has the protocol of its search, so that its steps between evaluations are those of the trials.
        """
        total, intervals = 0, {}
        for run in runs:
            if (search := self.of_run(run)) is not None:
                intervals[search.study] = search, run.record["config"]["protocol"].get("eval_steps")
        for search, interval in intervals.values():
            if search.evaluations is None or not is_number(interval):
                return None
            total += int(search.evaluations * interval)
        return total or None

    def machines_of(self, search: Search) -> str:
        """The machines of a search's trials, from their records; empty without such records."""
        paths = sorted((self._results / "runs" / search.study).glob("*.json"))
        return " and ".join(dict.fromkeys(filter(None, map(_read_machine, paths))))


def machine_of(record: Mapping[str, Any]) -> str:
    """The GPU that a record names, its CPU if the run used none, or empty; several if it was continued elsewhere."""
    processes = list_processes(record.get("environment", {}))
    names = dict.fromkeys(read_device_name(one.get("hardware") or {}) for one in processes)
    return " and ".join(filter(None, names))


def _read_machine(path: Path) -> str:
    try:
        return machine_of(read_record(path))
    except UserError:
        return ""  # the report lists damaged records


def study_of(run: EvidenceRun) -> str:
    """Name of the study that a run's record names; empty without one."""
    about = run.record.get("hparams") or {}
    source = str(about.get("from", ""))
    return str(about.get("study") or source.removeprefix("study:") if source.startswith(("study:", "search")) else "")


def _read_search(summary: Mapping[str, Any], results: Path) -> Search:
    study, trials = str(summary["study"]), summary["trials"]
    finished = int(trials["complete"]) + int(trials.get("pruned", 0))
    values = {str(key): float(value) for key, value in summary["best"]["values"].items() if is_number(value)}
    evaluations = _count_evaluations(results / "studies" / study / "trials.csv")
    alike = {key: describe_setting(summary[key]) for key in ALIKE if summary.get(key) is not None}
    hours, is_at_edge = float(summary.get("seconds", 0.0)) / 3600, bool(summary.get("at_edge"))
    return Search(study, finished, hours, values, evaluations, alike, is_at_edge)


def _count_evaluations(trials: Path) -> int | None:
    """Those of finished trials: a trial that took over from a stopped one counts the evaluations of both."""
    if not trials.is_file():
        return None
    frame = pd.read_csv(trials)
    if "evaluations" not in frame:  # an export of an earlier version
        return None
    finished = frame[frame["state"].isin(("complete", "pruned"))]
    counts = pd.to_numeric(finished["evaluations"], errors="coerce").dropna()
    return int(counts.sum()) if len(counts) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name_value(key: str) -> str:
    return "rate" if key == RATE else key
