"""A sweep from its configuration to its end: the checks, the workers on this machine, the last word."""

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
    """Work on the study of a composed configuration until it has all its trials.

    Raises:
        UserError: for whatever the user can mend, before anything expensive where that is possible.
    """
    plan = make_plan(composed)
    if plan.sweep.worker is not None and plan.sweep.workers == 1:
        _take_device(plan.sweep.worker)
    shared = open_study(plan, overwrite=plan.sweep.overwrite)
    console.print(
        f"study {plan.sweep.study} in {shared.store.shown}: {_standing(shared)}", markup=False, soft_wrap=True
    )
    if plan.sweep.workers == 1 or shared.is_finished():
        Worker(shared, labels).work()
    else:
        _run_workers(composed, plan.sweep.workers, labels)
    console.print(_last_word(shared), markup=False, soft_wrap=True)
    if not shared.is_finished():
        raise UserError(f"study {plan.sweep.study} is not finished, its workers ended: the same command continues")


def _run_workers(composed: DictConfig, count: int, labels: Mapping[str, Any] | None) -> None:
    """Start `count` processes and wait for them; one that dies leaves its trial to the others."""
    processes = start_workers(composed, count, labels)
    try:
        for process in processes:
            process.join()
    except BaseException:
        _stop(processes)
        raise


def start_workers(composed: DictConfig, count: int, labels: Mapping[str, Any] | None = None) -> list[BaseProcess]:
    """Processes that work on the study of a composed configuration, which exists."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # Imports take longer than many a trial: done once, in a process that holds no threads and no GPU.
        context.set_forkserver_preload([__name__, "sparsegrad.runs.runner"])
    content = OmegaConf.to_container(composed, resolve=False)
    processes = [context.Process(target=_child, args=(content, index, count, labels)) for index in range(count)]
    with _without_bars():
        for process in processes:
            process.start()
    return processes


@contextmanager
def _without_bars() -> Iterator[None]:
    """Processes started meanwhile show no progress bars: those of several workers would overwrite each other."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _stop(processes: list[BaseProcess]) -> None:
    """Ctrl-C reaches the children too: they give their trials back; who does not end is ended."""
    for process in processes:
        process.join(timeout=20)
    for process in processes:
        if process.is_alive():
            process.terminate()


def _child(content: Any, index: int, count: int, labels: Mapping[str, Any] | None) -> None:
    """One worker process: its share of the machine, then trials."""
    from sparsegrad.runs.quiet import quiet_libraries, quiet_transformers

    _take_share(index, count)
    quiet_libraries()
    quiet_transformers()
    try:
        Worker(open_study(make_plan(OmegaConf.create(content))), labels).work()
    except UserError as error:
        print(f"error: worker {index}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _take_share(index: int, count: int) -> None:
    """Threads and GPU of one worker among `count`."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    _take_device(index)


def _take_device(index: int) -> None:
    """One of the GPUs that this process may use, if there are several."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]


def _standing(shared: SharedStudy) -> str:
    budget = shared.plan.budget
    return f"{len(shared.ledger().finished(budget))} of {budget} trials finished"


def _last_word(shared: SharedStudy) -> str:
    """Counts and the best trial."""
    finished = shared.ledger().finished(shared.plan.budget)
    pruned = sum(trial.state == TrialState.PRUNED for trial in finished)
    said = f"study {shared.plan.sweep.study}: {_standing(shared)}, {pruned} of them pruned"
    if pruned == len(finished):
        return f"{said}; none ran to its end"
    best = shared.study.best_trial
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    return (
        f"{said}; best {shared.plan.metric} {best.value:.4f} ({shared.plan.sweep.objective}), trial {best.number}: "
        f"{values}\nuse it: hparams=study:{shared.plan.sweep.study}; look: "
        f"python -m sparsegrad.sweeps show {shared.plan.sweep.study}"
    )
