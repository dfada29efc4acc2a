"""Searches: their composition and checks, the trials that they lack, and those of Tables 13-15.

At the paper's scale, the search of a table is the one of the paper's text (sweep=paper); at the mini scale those of the
evidence plan on MiniLM (sweep=evidence, which `make search` makes for all methods). `search_all.make` finishes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from optuna.trial import TrialState

from experiments.paths import CONF, ROOT
from experiments.published import TASKS
from experiments.reproduce.commands import overwrite
from experiments.reproduce.costs import Estimates, facts_of
from experiments.reproduce.dry_run import format_left, print_listing
from experiments.reproduce.plans import read_plan
from sparsegrad.errors import UserError
from sparsegrad.runs.overrides import explain, key_of
from sparsegrad.runs.predictions import predictions_path
from sparsegrad.runs.records import read_record
from sparsegrad.sweeps.config import Plan, make_plan
from sparsegrad.sweeps.ledger import Ledger
from sparsegrad.sweeps.search_results import (
    OWN_NAME,
    find_difference,
    find_other_condition,
    read_settings,
    select_conditions,
    select_settings,
)
from sparsegrad.sweeps.storage import find_file, open_store
from sparsegrad.sweeps.study import IDENTITY, content_of, delete, find_refusal, read_fingerprint

TABLES = {
    "table13": ("bert_base", "sparsegrad"),
    "table14": ("bert_base", "full"),
    "table15": ("roberta_base", "full"),
}
MINI_PLAN = "evidence_paper"  # its model and tasks stand for those of the paper


@dataclass(frozen=True)
class Search:
    """One study of a table.

    Attributes:
        overrides: overrides of run.py that compose it.
        plan: the checked sweep.
        anew: the arguments of `make` that make this search alone anew.
    """

    overrides: tuple[str, ...]
    plan: Plan
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

    def finished(self) -> int:
        """Number of finished trials, from the storage or, where that is gone, from the summary."""
        return min(self.plan.budget, max(self._count_stored(), self._count_summarised()))

    def read_summary(self) -> dict[str, Any]:
        """The content of the summary; empty if it is missing or damaged, because the next export replaces it."""
        try:
            found = json.loads(self.summary.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

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
        try:
            trials = self.read_summary()["trials"]
            return int(trials["complete"]) + int(trials["pruned"])
        except (ValueError, KeyError, TypeError):
            return 0


def has_completed(study: optuna.Study) -> bool:
    """Whether a trial was completed; the others were pruned, or failed."""
    return any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))


def planned_searches(table: str, scale: str, data: str | None, overrides: Sequence[str]) -> list[Search]:
    """The studies of a table; `task=` among the overrides narrows its tasks.

    Raises:
        UserError: for a value that is not allowed.
    """
    model, method = TABLES[table]
    narrowed = [one.partition("=")[2].split(",") for one in overrides if one.startswith("task=")]
    rest = [one for one in overrides if not one.startswith("task=")]
    if scale == "paper":
        tasks, about = list(TASKS.values()), ["sweep=paper", f"model={model}", f"method={method}"]
    else:
        tasks = list(read_plan(MINI_PLAN).grid["task"])
        about = [f"experiment={MINI_PLAN}", "sweep=evidence", f"method={method}", "hydra.mode=RUN"]
    tasks = narrowed[-1] if narrowed else tasks
    return [
        make_search([*about, f"task={task}", *rest], task, data, overwrite([f"task={task}", *rest])) for task in tasks
    ]


def compose_sweep(overrides: Sequence[str]) -> DictConfig:
    """The configuration that run.py composes from these; options of Hydra, which are for the launcher, are left out."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [one for one in overrides if not one.startswith("hydra.")])


def make_search(overrides: list[str], task: str, data: str | None, anew: str) -> Search:
    """Compose and check one search; `data` is the folder of every task but the snippets, `anew` as in `Search`.

    Raises:
        UserError: for a value that is not allowed, or if the search of this name has other settings of the method or
            of training; `sweep.overwrite=true` makes such a search anew.
    """
    given = [*overrides, f"data.dir={data}"] if data and task != "snippets" else overrides
    try:
        search = Search(tuple(given), make_plan(compose_sweep(given)), anew)
        if not search.plan.sweep.overwrite:
            _check_stored(search)
    except HydraException as error:
        raise explain(error, given, CONF) from None
    return search


def _check_stored(search: Search) -> None:
    """Refuse a study or summary of something else: it would count as this search."""
    if found := _find_other_condition(search):
        remedy = f"make it anew with {search.anew}, or leave that setting as it was"
        raise UserError(f"search {search.study} was made with {found}: {remedy}")
    if found := _find_other_setting(search):
        raise UserError(f"search {search.study} was made with {found}: {OWN_NAME}; or make it anew with {search.anew}")


def find_staleness(search: Search) -> str:
    """Why `sweep.overwrite=true` makes a search anew; empty if there is none, or if it is the one asked for.

    A search that was begun anew is the one asked for, so the same command continues it instead of deleting it again.
    """
    if found := _find_other_condition(search) or _find_other_setting(search):
        return f"it was made with {found}"
    if search.is_barren:
        return "no trial was completed"
    if found := _find_other_goal(search) or _find_other_data(search):
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
    """Whether a study or summary looked for something else, or had another budget."""
    wanted: dict[str, Any] = json.loads(json.dumps(search.plan.identity()))  # as a storage has it
    study, summary = search.load_study(), search.read_summary()
    for stored in (summary, {} if study is None else study.user_attrs.get(IDENTITY, {})):
        for part in ("space", "direction", "metric", "objective", "budget"):
            if part in wanted and stored.get(part, wanted[part]) != wanted[part]:
                return f"its {part} is {stored[part]}, not {wanted[part]}"
    if search.is_summarised and summary.get("best", {}).get("values", {}).keys() != wanted["space"].keys():
        return "its summary has other values than those searched"
    return ""


def _find_other_data(search: Search) -> str:
    """Whether a summary is of data with another content; empty where one of the two is not at hand."""
    stored = search.read_summary().get("content", {}).get("data")
    found = None if stored is None else read_fingerprint(search.plan)
    return "" if found is None or found == stored else f"its data has the fingerprint {stored}, not {found}"


def delete_search(search: Search) -> None:
    """Delete the study and the summary of a search; the records of its trials stay, except those of other data.

    A record of the same settings saves the new search a trial, but one of other data would be refused.
    """
    found = read_fingerprint(search.plan)
    # The records first: after an interruption, the study still says that it is another one.
    for path in sorted(search.plan.base.record_path.parent.glob("*.json")):
        if found is not None and _read_data(path) not in (None, found):
            path.unlink()
            predictions_path(path).unlink(missing_ok=True)
    if search.load_study() is not None:
        delete(open_store(search.plan.sweep.storage), search.study)
    search.summary.unlink(missing_ok=True)


def _read_data(record: Path) -> str | None:
    """The fingerprint of the data of a record; None if it does not say, or is damaged, which its run will report."""
    try:
        return content_of(read_record(record)).get("data")
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


def launch(missing: Sequence[Search], launcher: str) -> None:
    """Add a worker to each study by a Hydra launcher, one command for all studies that share a data folder."""
    groups: dict[str | None, list[Search]] = {}
    for one in missing:
        groups.setdefault(one.plan.base.data.dir, []).append(one)
    for group in groups.values():
        call(_command(group, launcher))


def call(command: Sequence[str]) -> None:
    """Run a command; its output is not captured."""
    subprocess.run(command, check=False)


def _command(group: Sequence[Search], launcher: str) -> list[str]:
    """The command of a launcher with one job per study."""
    tasks = ",".join(one.plan.base.task.name for one in group)
    rest = [one for one in group[-1].worker_overrides if not one.startswith(("task=", "hydra.mode="))]
    # Without the sweeper parameters of a plan, its seeds among them: one job per study.
    more = [f"task={tasks}", "hydra.sweeper.params=null", f"hydra/launcher={launcher}"]
    return [sys.executable, str(ROOT / "run.py"), "-m", *rest, *more]


def show(found: Sequence[Search], stale: Collection[Search] = ()) -> None:
    """Print the total hours that are left, and one line per study; `stale` are those that are made anew."""
    estimates = Estimates(found[0].results / "runs")
    rows, total, unknown = [], 0.0, 0
    for one in found:
        done, budget = 0 if one in stale else one.finished(), one.plan.budget
        each, source = estimates.of({**facts_of(one.plan.base.resolved), "experiment": one.study})
        left = budget - done
        total, unknown = total + left * (each or 0.0), unknown + (left if each is None else 0)
        row = {"study": one.study, "trials finished": f"{done} of {budget}", "hours left": format_left(left, each)}
        rows.append({**row, "estimated from": source if left else "-"})
    complete = sum(one.is_finished for one in found if one not in stale)
    print_listing(
        f"{complete} of {len(found)} studies complete; about {total:.1f} hours left, one trial at a time"
        + (f"; {unknown} trials of unknown cost" if unknown else ""),
        rows,
    )
