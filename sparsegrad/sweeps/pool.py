"""Run a sweep: check its configuration, start workers on this machine, print the result."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, TrialState

from sparsegrad.errors import UserError
from sparsegrad.progress import NO_BARS, QUIET, remark, say
from sparsegrad.sweeps.config import SweepPlan, make_plan
from sparsegrad.sweeps.hparams import STORAGE, default_file, default_storage
from sparsegrad.sweeps.ledger import FAILURE, MISTAKE, REASON, find_winner
from sparsegrad.sweeps.packing import check_packing, count_slots, take_device
from sparsegrad.sweeps.search_plans import DEFAULT
from sparsegrad.sweeps.storage import SECRET, hide_password
from sparsegrad.sweeps.study import SharedStudy, open_study
from sparsegrad.sweeps.worker import Worker, show_trials, update_trials
from sparsegrad.threads import limit_threads
from sparsegrad.trainer.signals import REPEAT, StopOnSignal, Stopped

_LOOK = 2.0  # seconds between two counts of the finished trials


def run_sweep(composed: DictConfig, labels: Mapping[str, Any] | None = None) -> None:
    """Work on the study of a composed configuration until all its trials are finished.

    Args:
        composed: the configuration, with a `sweep` node.
        labels: are stored in the record of each trial.

    Raises:
        UserError: for mistakes that the user can correct; most are found before the first trial.
    """
    plan = make_plan(composed)
    if plan.sweep.worker is not None and plan.sweep.workers == 1:
        take_device(plan.sweep.worker)
    check_packing(plan)
    if plan.sweep.workers == 1 and plan.sweep.device_share is not None:
        limit_threads(count_slots(plan))
    shared = open_study(plan, overwrite=plan.sweep.overwrite)
    remark(f"study {plan.sweep.study} in {shared.store.address}: {_count_finished(shared, shared.finished())}")
    if plan.sweep.workers == 1 or shared.is_finished():
        Worker(shared, labels).work()
    else:
        _run_workers(composed, shared, labels)
    say(_summarize(shared))
    if not shared.is_finished():
        raise UserError(
            f"study {plan.sweep.study} is not finished, but its workers have ended: run the same command to continue"
        )


def _run_workers(composed: DictConfig, shared: SharedStudy, labels: Mapping[str, Any] | None) -> None:
    """Start the worker processes and wait for them; if one dies, another repeats its trial."""
    processes = start_workers(composed, shared.plan.sweep.workers, labels)
    try:
        with StopOnSignal().listening(), show_trials(shared) as bar:
            while any(process.is_alive() for process in processes):
                multiprocessing.connection.wait([process.sentinel for process in processes], timeout=_LOOK)
                processes = [process for process in processes if process.is_alive()]
                update_trials(bar, shared, shared.finished())
    except Stopped as stop:
        _pass_on(stop.number, processes)
        raise
    except KeyboardInterrupt:
        remark("interrupted: the workers save after their step or evaluation; Ctrl-C again stops at once")
        _stop_workers(processes)
        raise
    except BaseException:
        _stop_workers(processes)
        raise


def start_workers(composed: DictConfig, count: int, labels: Mapping[str, Any] | None = None) -> list[BaseProcess]:
    """Start processes that work on the existing study of a composed configuration.

    Args:
        composed: the configuration, with a `sweep` node.
        count: number of processes.
        labels: are stored in the record of each trial.
    """
    # Not "fork": a forked copy of a process with threads, or with CUDA in use, can deadlock.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # Imports can take longer than a trial. The fork server does them once; it has no threads and uses no GPU.
        context.set_forkserver_preload([__name__, "sparsegrad.runs.runner"])
    content = OmegaConf.to_container(composed, resolve=False)
    processes = [context.Process(target=_run_worker, args=(content, index, labels)) for index in range(count)]
    with _silence():
        for process in processes:
            process.start()
    return processes


@contextmanager
def _silence() -> Iterator[None]:
    """Let processes started inside show no progress: the bars of several workers would overwrite each other."""
    before = {name: os.environ.get(name) for name in ("TQDM_DISABLE", QUIET)}
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault(QUIET, NO_BARS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _stop_workers(processes: list[BaseProcess]) -> None:
    """Wait until the workers have saved and ended: Ctrl-C reaches them too, except where only this process got it.

    Those outside training return their trials within seconds. The signal to the rest follows soon enough to count as
    the same as theirs, so that it interrupts no checkpoint.
    """
    end = time.monotonic() + REPEAT / 2
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    _pass_on(signal.SIGTERM, processes)


def _pass_on(number: int, processes: list[BaseProcess]) -> None:
    """Send the workers a signal that only this process may have received, and wait until they have saved and ended."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
    for process in processes:
        process.join()


def _run_worker(content: Any, index: int, labels: Mapping[str, Any] | None) -> None:
    """Run one worker process on its share of the machine."""
    from sparsegrad.trainer.quiet import quiet_libraries, quiet_transformers

    quiet_libraries()
    quiet_transformers()
    try:
        plan = make_plan(OmegaConf.create(content))
        limit_threads(count_slots(plan))  # otherwise every worker uses all cores
        take_device(index)
        Worker(open_study(plan), labels).work()
    except UserError as error:
        print(f"error: worker {index}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT


def _count_finished(shared: SharedStudy, finished: Sequence[FrozenTrial]) -> str:
    return f"{len(finished)} of {shared.plan.budget} trials finished"


def _summarize(shared: SharedStudy) -> str:
    """Return the counts, the best trial, and the commands that use it."""
    finished = shared.finished()
    pruned = sum(trial.state == TrialState.PRUNED for trial in finished)
    text = f"study {shared.plan.sweep.study}: {_count_finished(shared, finished)}, {pruned} of them pruned"
    refused = [trial for trial in finished if trial.user_attrs.get(FAILURE) == MISTAKE]
    if refused:
        text += f" ({len(refused)} refused, the first: trial {refused[0].number}, {refused[0].user_attrs[REASON]})"
    best = find_winner(shared.study)
    if best is None:
        return f"{text}; no trial was completed"
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    return (
        f"{text}; best {shared.plan.metric} {best.value:.4f} ({shared.plan.sweep.objective}), trial {best.number}: "
        f"{values}\n{_explain_use(shared.plan)}"
    )


def _explain_use(plan: SweepPlan) -> str:
    """How to use and show the study, also from another shell than that of the sweep, such as a Slurm job's."""
    study, where, place = plan.sweep.study, plan.base.results_dir, _name_storage(plan)
    use, show = f"hparams=study:{study}", f"python -m sparsegrad.sweeps show {study}"
    if where != DEFAULT:
        use, show = f"{use} results_dir={shlex.quote(where)}", f"{show} --results-dir {shlex.quote(where)}"
    if place:
        use, show = f"{STORAGE}={place} python run.py ... {use}", f"{show} --storage {place}"
    return f"use it: {use}; details: {show}"


def _name_storage(plan: SweepPlan) -> str:
    """The storage as a shell needs it; empty if it is the default one, or if only the environment has its password."""
    where, results = plan.sweep.storage, plan.base.results_dir
    shown = hide_password(where)
    if where == default_storage(results) and (where == default_file(results) or SECRET in shown):
        return ""
    return shlex.quote(shown if SECRET in shown else where)
