"""A study that workers share: open or create it, check that it fits the plan, take and close trials."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from sparsegrad.errors import ResourceError, UserError, did_you_mean
from sparsegrad.sweeps.config import SweepPlan
from sparsegrad.sweeps.leases import WORKER, Watch, this_worker
from sparsegrad.sweeps.ledger import DIED, FAILURE, REASON, REDO_OF, SURPLUS, Ledger
from sparsegrad.sweeps.samplers import make_pruner, make_sampler
from sparsegrad.sweeps.storage import FIRST_SWEEP, Store, open_existing_store, open_store, patiently

IDENTITY, LABELS, CONTENT = "identity", "labels", "content"
_LATER = ("sampler", "pruner")  # parts of an identity that studies of earlier versions do not have


class SharedStudy:
    """A study as one worker uses it."""

    def __init__(self, plan: SweepPlan, store: Store, study: Study) -> None:
        self.plan, self.store, self.study = plan, store, study
        self._watch = Watch(plan.sweep.lease)
        self._me = this_worker()

    def ledger(self) -> Ledger:
        """Return the current trials."""
        return Ledger(self.study.get_trials(deepcopy=False))

    def finished(self) -> list[FrozenTrial]:
        """Return the finished trials that count."""
        return self.ledger().finished(self.plan.budget)

    def is_finished(self) -> bool:
        """Whether all trials of the plan are finished."""
        return len(self.finished()) >= self.plan.budget

    def take(self) -> Trial | None:
        """Take the next trial; None while other workers run all that are left.

        Each part is repeated while the storage is unavailable. A trial that is created and then lost has no worker yet,
        so that it counts as dead after a lease.
        """
        lease = self.plan.sweep.lease
        with self.store.claiming():
            # Recover first: a failed trial queued again comes before a new one.
            ledger = patiently(self._recover_trials, lease)
            if not ledger.has_work(self.plan.budget, self.plan.ordered_from):
                return None
            trial = patiently(partial(self.study.ask, self.plan.distributions), lease)
            patiently(partial(trial.set_user_attr, WORKER, self._me), lease)
        # Storages without a lock may have given another worker a trial meanwhile: this one may be surplus.
        now = patiently(self.ledger, lease)
        if not now.counts(trial.number, self.plan.budget):
            reason = "more workers asked for trials than were left"
        elif ledger.is_early(now.slot(trial.number), self.plan.ordered_from):
            reason = "an earlier trial, on which its values depend, was not finished"
        else:
            return trial
        self.close(trial, TrialState.FAIL, {SURPLUS: True, REASON: reason})
        return None

    def close(
        self, trial: Trial | FrozenTrial, state: TrialState, facts: Mapping[str, Any], value: float | None = None
    ) -> bool:
        """End a trial and store facts with it; False if another worker has ended it already."""
        values = None if value is None else [value]
        with self.store.claiming():
            try:
                # Facts first: a finished trial cannot be changed.
                for name, fact in facts.items():
                    self.store.storage.set_trial_user_attr(trial._trial_id, name, fact)
                return self.store.storage.set_trial_state_values(trial._trial_id, state, values)
            except UpdateFinishedTrialError:
                return False

    def check_content(self, record: Mapping[str, Any]) -> None:
        """Compare what a trial's record was made from with the other trials'; the first one's is stored in the study.

        Raises:
            UserError: for a record of other data, or of another model of the same name.
        """
        found = content_of(record)
        stored = self.study.user_attrs.get(CONTENT)
        if stored is None and found:
            self.study.set_user_attr(CONTENT, found)
        else:
            _compare_content(self.study.study_name, stored or {}, found)

    def _recover_trials(self) -> Ledger:
        """Fail the trials of dead workers, and queue every failed trial again; the trials after that.

        They are read again only if something has changed: with many workers, reading is most of what a storage does.
        """
        ledger = self.ledger()
        dead = [one for one in ledger.trials if one.state == TrialState.RUNNING and self._watch.is_dead(one)]
        for trial in dead:
            self._close_dead(trial, ledger)
        ledger = self.ledger() if dead else ledger
        failed = ledger.to_redo(self.plan.budget)
        for trial in failed:
            # A worker that died while it asked may have stored only some values: all are drawn again. They are the
            # same, except with tpe and gp, which look at what has finished by now.
            values = trial.params if trial.params.keys() == self.plan.distributions.keys() else {}
            self.study.enqueue_trial(values, user_attrs={REDO_OF: trial.number})
        return self.ledger() if failed else ledger

    def _close_dead(self, trial: FrozenTrial, ledger: Ledger) -> None:
        """End the trial of a dead worker; after `sweep.retries` deaths as pruned, so that it is not queued again."""
        retries = self.plan.sweep.retries
        if not ledger.counts(trial.number, self.plan.budget):
            self.close(trial, TrialState.FAIL, {SURPLUS: True, REASON: "its worker died"})
        elif ledger.deaths(trial.number) < retries:
            self.close(trial, TrialState.FAIL, {FAILURE: DIED, REASON: "its worker died"})
        else:
            reason = f"its worker died, and {retries} times before: given up"
            self.close(trial, TrialState.PRUNED, {FAILURE: DIED, REASON: reason})


def open_study(plan: SweepPlan, *, overwrite: bool = False) -> SharedStudy:
    """Open the study of a plan, or create it.

    Args:
        plan: the checked sweep.
        overwrite: delete an existing study of that name first.

    Raises:
        UserError: if the storage cannot be used, or its study of that name searches something else.
    """
    quiet()
    store = open_store(plan.sweep.storage)
    if overwrite:
        delete(store, plan.sweep.study)
    options = {"sampler": make_sampler(plan), "pruner": make_pruner(plan.sweep)}
    with store.claiming():
        study = _create_or_load(plan, store, options)
        _check_identity(plan, study)
    _check_content(plan, study)
    _name_metric(plan, study)
    return SharedStudy(plan, store, study)


def load_study(where: str, name: str) -> Study:
    """Load an existing study to read it.

    Raises:
        UserError: if there is none of that name; lists those that exist.
    """
    quiet()
    store = open_existing_store(where)
    names = sorted(optuna.get_all_study_names(store.storage))
    if not names:
        raise UserError(f"{store.address} has no study yet: {FIRST_SWEEP}")
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(
            f"{store.address} has no study {name}; it has: {', '.join(names)}" + (f"; {hint}" if hint else "")
        )
    return optuna.load_study(study_name=name, storage=store.storage)


def delete(store: Store, name: str) -> None:
    """Delete a study if it exists; the records of its trials are kept."""
    if name in optuna.get_all_study_names(store.storage):
        optuna.delete_study(study_name=name, storage=store.storage)


def quiet() -> None:
    """Silence Optuna's log: it repeats what the worker prints."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _create_or_load(plan: SweepPlan, store: Store, options: dict[str, Any]) -> Study:
    name, storage, direction = plan.sweep.study, store.storage, StudyDirection[plan.sweep.direction.upper()]
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=direction, **options)
    except DuplicatedStudyError:  # it exists, or another worker was faster
        return optuna.load_study(study_name=name, storage=storage, **options)
    _write_identity(plan, study)
    return study


def _write_identity(plan: SweepPlan, study: Study) -> None:
    """Store in the study what it searches; as one attribute, so that it is stored completely or not at all."""
    base = plan.base
    labels = {"model": base.model.name, "method": base.method.name, "task": base.task.name, "sweep": plan.sweep.name}
    study.set_user_attr(IDENTITY, plan.identity())
    study.set_user_attr(LABELS, labels)


def _check_identity(plan: SweepPlan, study: Study) -> None:
    """Refuse a study that searches something else.

    Raises:
        UserError: with both values of the first difference.
    """
    # The round trip by JSON turns tuples into lists, as the storage does.
    found, wanted = study.user_attrs.get(IDENTITY), json.loads(json.dumps(plan.identity()))
    if found is None and not study.get_trials(deepcopy=False):
        _write_identity(plan, study)  # the worker that created it died before it stored the identity
        return
    remedy = "choose another sweep.study=, or sweep.overwrite=true to delete it and start again"
    if found is None:
        raise UserError(f"study {study.study_name} was not made by a sweep of this project; {remedy}")
    for part in ("space", "direction", "metric", "objective", "budget", *_LATER):
        if found.get(part) != wanted.get(part) and not (part in _LATER and part not in found):
            raise UserError(
                f"study {study.study_name} exists with another {part}: there {_format_value(found.get(part))}, "
                f"here {_format_value(wanted.get(part))}; {remedy}"
            )
    here, there = wanted["fixed"], found["fixed"]
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise UserError(
                f"study {study.study_name} exists with another {key}: there {there.get(key)}, here {here.get(key)}; "
                f"{remedy}"
            )


def find_refusal(plan: SweepPlan, study: Study) -> str:
    """Why a worker of this plan would not continue a study, without the remedy; empty if it would."""
    try:
        _check_identity(plan, study)
        _check_content(plan, study)
    except ResourceError:
        raise
    except UserError as error:
        return str(error).partition(";")[0]
    return ""


def _name_metric(plan: SweepPlan, study: Study) -> None:
    """Name the searched value, which the dashboard and plots would call "Objective 0"."""
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # in Optuna since 3.2
            study.set_metric_names([plan.metric])


def content_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record says of the content it was made from: the data's fingerprint, the model's identity."""
    found = {"data": record.get("data", {}).get("fingerprint"), "model": record.get("source", {}).get("model")}
    return {part: str(value) for part, value in found.items() if value is not None}


def _check_content(plan: SweepPlan, study: Study) -> None:
    """Refuse to continue a study with other data, before a trial starts; data that is not at hand is found out later.

    Names say too little: `data.dir` is no part of a run's key, and a folder can be changed in place.
    """
    stored = study.user_attrs.get(CONTENT)
    if stored is not None and (found := read_fingerprint(plan)) is not None:
        _compare_content(study.study_name, stored, {"data": found})


def read_fingerprint(plan: SweepPlan) -> str | None:
    """The fingerprint of the data that a plan reads; None if it is not at hand."""
    try:
        return plan.base.task.load(plan.base.data).fingerprint
    except UserError:
        return None


def _compare_content(name: str, stored: Mapping[str, str], found: Mapping[str, str]) -> None:
    for part in stored.keys() & found.keys():
        if stored[part] != found[part]:
            raise UserError(
                f"study {name} was searched with another {part} (there {stored[part]}, here {found[part]}); give the "
                "same one, choose another sweep.study= and name=, or delete its records in results_dir/runs and start "
                "again with sweep.overwrite=true"
            )


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
