"""One search: its composition, and the study and summary that it has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig
from optuna.trial import TrialState

from experiments.paths import CONF
from sparsegrad.errors import UserError
from sparsegrad.files import load_json, unreadable
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.config import SweepPlan
from sparsegrad.sweeps.leases import Watch
from sparsegrad.sweeps.ledger import Ledger
from sparsegrad.sweeps.search_results import count_finished
from sparsegrad.sweeps.storage import find_file, open_store


@dataclass(frozen=True)
class Search:
    """One study of a table.

    Attributes:
        overrides: overrides of run.py that compose it.
        plan: the checked sweep.
        anew: the `make` command that makes this search alone anew.
    """

    overrides: tuple[str, ...]
    plan: SweepPlan
    anew: str

    @property
    def study(self) -> str:
        """Name of the study."""
        return self.plan.sweep.study

    @property
    def worker_overrides(self) -> list[str]:
        """The overrides without `sweep.overwrite`: `search_all.make` deletes what is to be overwritten, once."""
        return [one for one in self.overrides if key_of(one) != "sweep.overwrite"]

    @property
    def results(self) -> Path:
        """The results folder."""
        return Path(self.plan.base.results_dir)

    @property
    def summary(self) -> Path:
        """The file that `python -m sparsegrad.sweeps show` writes."""
        return self.results / "studies" / self.study / "summary.json"

    @property
    def is_finished(self) -> bool:
        """Whether all its trials are finished."""
        return self.finished() >= self.plan.budget

    @property
    def is_summarised(self) -> bool:
        """Whether the summary is of all trials, so that runs can use it."""
        return self._count_summarised() >= self.plan.budget

    @property
    def is_barren(self) -> bool:
        """Whether it is finished without a completed trial, so that it gives no rate."""
        study = None if self.is_summarised or not self.is_finished else self.load_study()
        return study is not None and not has_completed(study)

    @property
    def has_worker(self) -> bool:
        """Whether a worker runs one of its trials; one of another machine counts even if it has died."""
        study, watch = self.load_study(), Watch(self.plan.sweep.lease)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if study else []
        return not all(map(watch.is_dead, running))

    def finished(self) -> int:
        """Number of finished trials, from the storage or, where that is gone, from the summary."""
        return min(self.plan.budget, max(self._count_stored(), self._count_summarised()))

    def read_summary(self) -> dict[str, Any]:
        """The content of the summary; empty without one, or where the next export replaces a damaged one.

        Raises:
            UserError: when it is damaged and the storage has no study: the search would silently begin again.
            ResourceError: when the disk does not let it be read.
        """
        try:
            found: dict[str, Any] = load_json(self.summary)
            count_finished(found)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise unreadable(self.summary, error) from error
        except (ValueError, KeyError, TypeError) as error:
            if self.load_study() is None:
                raise UserError(
                    f"{self.summary} is not a summary of a search ({error!r}): restore it, or delete it to make its "
                    f"{self.plan.budget} trials again"
                ) from None
            return {}
        return found

    def load_study(self) -> optuna.Study | None:
        """The study in the storage; None if there is none."""
        where = self.plan.sweep.storage
        if (file := find_file(where)) is not None and not file.is_file():
            return None
        storage = open_store(where).storage  # only now: opening would create a missing file
        if self.study not in optuna.get_all_study_names(storage):
            return None
        return optuna.load_study(study_name=self.study, storage=storage)

    def _count_stored(self) -> int:
        study = self.load_study()
        return 0 if study is None else len(Ledger(study.get_trials(deepcopy=False)).finished(self.plan.budget))

    def _count_summarised(self) -> int:
        found = self.read_summary()
        return count_finished(found) if found else 0


def has_completed(study: optuna.Study) -> bool:
    """Whether a trial was completed; the others were pruned, or failed."""
    return any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))


def compose_sweep(overrides: Sequence[str]) -> DictConfig:
    """The configuration that run.py composes from these; options of Hydra, which are for the launcher, are left out."""
    return compose_run([one for one in overrides if not one.startswith("hydra.")], CONF)
