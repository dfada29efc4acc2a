"""Run a sweep: check its configuration, start workers on this machine, print the result."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from sparsegrad.errors import UserError
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.study import SharedStudy, open_study
from sparsegrad.sweeps.worker import Worker, console


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
        _take_device(plan.sweep.worker)
    shared = open_study(plan, overwrite=plan.sweep.overwrite)
    console.print(
        f"study {plan.sweep.study} in {shared.store.address}: {_count_finished(shared)}", markup=False, soft_wrap=True
    )
    if plan.sweep.workers == 1 or shared.is_finished():
        Worker(shared, labels).work()
    else:
        _run_workers(composed, plan.sweep.workers, labels)
    console.print(_summarize(shared), markup=False, soft_wrap=True)
    if not shared.is_finished():
        raise UserError(
            f"study {plan.sweep.study} is not finished, but its workers have ended: run the same command to continue"
        )


def _run_workers(composed: DictConfig, count: int, labels: Mapping[str, Any] | None) -> None:
    """Start `count` worker processes and wait for them; if one dies, another repeats its trial."""
    processes = start_workers(composed, count, labels)
    try:
        for process in processes:
            process.join()
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
    processes = [context.Process(target=_run_worker, args=(content, index, count, labels)) for index in range(count)]
    with _disable_bars():
        for process in processes:
            process.start()
    return processes


@contextmanager
def _disable_bars() -> Iterator[None]:
    """Let processes started inside show no progress bars: those of several workers would overwrite each other."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _stop_workers(processes: list[BaseProcess]) -> None:
    """Wait for the workers, which Ctrl-C reaches too, to return their trials; then terminate the rest."""
    for process in processes:
        process.join(timeout=20)
    for process in processes:
        if process.is_alive():
            process.terminate()


def _run_worker(content: Any, index: int, count: int, labels: Mapping[str, Any] | None) -> None:
    """Run one worker process on its share of the machine."""
    from sparsegrad.trainer.quiet import quiet_libraries, quiet_transformers

    if "OMP_NUM_THREADS" not in os.environ:  # otherwise every worker uses all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    _take_device(index)
    quiet_libraries()
    quiet_transformers()
    try:
        Worker(open_study(make_plan(OmegaConf.create(content))), labels).work()
    except UserError as error:
        print(f"error: worker {index}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT


def _take_device(index: int) -> None:
    """Choose one of the GPUs that this process may use, if there are several."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]


def _count_finished(shared: SharedStudy) -> str:
    budget = shared.plan.budget
    return f"{len(shared.ledger().finished(budget))} of {budget} trials finished"


def _summarize(shared: SharedStudy) -> str:
    """Return the counts, the best trial, and the commands that use it."""
    finished = shared.ledger().finished(shared.plan.budget)
    pruned = sum(trial.state == TrialState.PRUNED for trial in finished)
    text = f"study {shared.plan.sweep.study}: {_count_finished(shared)}, {pruned} of them pruned"
    if pruned == len(finished):
        return f"{text}; no trial was completed"
    best = shared.study.best_trial
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    return (
        f"{text}; best {shared.plan.metric} {best.value:.4f} ({shared.plan.sweep.objective}), trial {best.number}: "
        f"{values}\nuse it: hparams=study:{shared.plan.sweep.study}; details: "
        f"python -m sparsegrad.sweeps show {shared.plan.sweep.study}"
    )
