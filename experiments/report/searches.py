"""The searches behind the evidence runs: trials and hours, from the summaries in results/studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report.evidence import EvidenceRun
from experiments.report.tables.hyperparams import summaries


@dataclass(frozen=True)
class Search:
    """One study: its finished trials, and their hours."""

    study: str
    trials: int
    hours: float


class Searches:
    """All studies of a results folder, by name."""

    def __init__(self, results: Path) -> None:
        self._found = {str(one["study"]): _read_search(one) for one in summaries(results)}

    def of_run(self, run: EvidenceRun) -> Search | None:
        """The search that gave a run its rate; None for a run without one, or if its summary is gone."""
        return self._found.get(study_of(run))

    def of_runs(self, runs: Iterable[EvidenceRun]) -> list[Search]:
        """The different searches behind several runs."""
        found = (self.of_run(run) for run in runs)
        return list({one.study: one for one in found if one is not None}.values())


def study_of(run: EvidenceRun) -> str:
    """Name of the study that a run's record names; empty without one."""
    about = run.record.get("hparams") or {}
    source = str(about.get("from", ""))
    return str(about.get("study") or source.removeprefix("study:") if source.startswith(("study:", "search")) else "")


def _read_search(summary: Mapping[str, Any]) -> Search:
    trials = summary["trials"]
    finished = int(trials["complete"]) + int(trials.get("pruned", 0))
    return Search(str(summary["study"]), finished, float(summary.get("seconds", 0.0)) / 3600)
