"""Simulated workers for experiments/studies/storage_load.py: real workers whose runs sleep instead of training."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from optuna.trial import Trial

from experiments.paths import CONF
from sparsegrad.progress import silence
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.config import RunConfig
from sparsegrad.sweeps.config import SweepPlan, make_plan
from sparsegrad.sweeps.leases import BEAT
from sparsegrad.sweeps.study import SharedStudy, open_study
from sparsegrad.sweeps.worker import Worker

START_SECONDS = 240  # in which all workers must have connected


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is simulated; see the module docstring."""

    storage: str
    workers: int
    trials: int
    seconds: float
    evaluations: int
    heartbeat: float
    sampler: str
    pruner: str
    limit: float
    processes: int
    max_connections: int


class TimeUpError(RuntimeError):
    """The measurement is over."""


class Clock:
    """Collects the seconds that named operations took, from all threads of a process."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name].append(time.perf_counter() - start)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.timed(name):
                return function(*arguments, **named)

        return call


class LoadPlan(SweepPlan):
    """The plan of all workers; building the configuration of a trial costs processor time but reads no storage."""

    def trial_config(self, parameters: Mapping[str, Any]) -> RunConfig:
        """Return the same run for every trial."""
        return self.base


class LoadWorker(Worker):
    """A worker whose run sleeps; its operations on the storage are timed."""

    def __init__(self, shared: SharedStudy, load: Load, clock: Clock, number: int, end: float) -> None:
        super().__init__(shared)
        self._clock, self._end = clock, end
        self._run = partial(run, load=load, clock=clock, end=end)
        # Otherwise the others would ask this machine's system whether it is alive, not its heartbeat.
        shared._me = {"machine": f"simulated {number}", "pid": 1, "started": 0.0}
        shared.ledger = clock.wrap("read", shared.ledger)  # type: ignore[method-assign]
        shared.close = clock.wrap("close", shared.close)  # type: ignore[method-assign]
        shared.take = partial(self._take, shared.take)  # type: ignore[method-assign]

    def _take(self, take: Callable[[], Trial | None]) -> Trial | None:
        if time.time() > self._end:
            raise TimeUpError
        with self._clock.timed("take"):
            trial = take()
        if trial is not None:
            trial.set_user_attr = partial(self._set, trial.set_user_attr)  # type: ignore[method-assign]
        return trial

    def _set(self, set_attribute: Callable[[str, Any], None], name: str, value: Any) -> None:
        with self._clock.timed("heartbeat" if name == BEAT else "progress"):
            set_attribute(name, value)

    def _free_memory(self) -> None:
        """All workers share one process: a collection would stop the others."""


def run(
    config: RunConfig, *, callbacks: Sequence[Any], labels: Mapping[str, Any], load: Load, clock: Clock, end: float
) -> tuple[dict[str, Any], bool]:
    """Stands in for `sparsegrad.runs.run`: sleeps, and reports scores that grow."""
    number, state = labels["sweep"]["trial"], SimpleNamespace(global_step=0, max_steps=load.evaluations, log_history=[])
    share = number * 0.618034 % 1  # spreads lengths and scores evenly over the trials
    for callback in callbacks:
        callback.on_train_begin(None, state, None)
    for step in range(1, load.evaluations + 1):
        time.sleep(load.seconds * (0.5 + share) / load.evaluations)
        if time.time() > end:
            raise TimeUpError
        state.global_step = step
        state.log_history.append({"step": step, "eval_accuracy": (1 - share / 2) * (1 - math.exp(-step))})
        for callback in callbacks:
            callback.on_step_end(None, state, None)
            with clock.timed("report"):
                callback.on_evaluate(None, state, None)
    clock.seconds["slept"].append(load.seconds * (0.5 + share))
    evaluations = [{"step": row["step"], "accuracy": row["eval_accuracy"]} for row in state.log_history]
    return {"result": {"chosen_step": load.evaluations}, "evaluations": evaluations, **labels}, True


def make_load_plan(load: Load, where: str) -> LoadPlan:
    """Compose the sweep as run.py does."""
    overrides = [
        "sweep=paper", "model=roberta_base", "method=sparsegrad", "task=sst2", "sweep.study=load",
        f"sweep.storage='{where}'", f"sweep.trials={load.trials}", f"sweep.heartbeat={load.heartbeat}",
        f"sweep.sampler={load.sampler}", f"sweep.pruner={load.pruner}",
    ]  # fmt: skip
    plan = make_plan(compose_run(overrides, CONF))
    return LoadPlan(sweep=plan.sweep, space=plan.space, composed=plan.composed, base=plan.base)


def run_clients(load: Load, where: str, first: int, count: int, barrier: Any, results: Any) -> None:
    """One process with `count` workers: connect them, wait for the other processes, work, send what was measured."""
    torch.set_num_threads(1)
    silence()
    threading.excepthook = lambda _: None  # heartbeats that end with the measurement
    gc.disable()  # a collection over the trials that all workers remember would stop them for seconds
    plan, clock = make_load_plan(load, where), Clock()
    shared = [one for one in (_open(plan, clock) for _ in range(count)) if one is not None]
    cpu = time.process_time()
    barrier.wait(START_SECONDS)
    end = time.time() + load.limit
    workers = [LoadWorker(one, load, clock, first + number, end) for number, one in enumerate(shared)]
    threads = [threading.Thread(target=_work, args=(worker, clock), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 20 - time.time()))
    results.put((dict(clock.seconds), clock.errors, time.process_time() - cpu))
    results.close()
    results.join_thread()
    os._exit(0)  # threads may hang in a storage that is overloaded


def _open(plan: SweepPlan, clock: Clock) -> SharedStudy | None:
    try:
        with clock.timed("open"):
            return open_study(plan)
    except Exception as error:
        clock.errors[f"open: {_name_error(error)}"] += 1
        return None


def _work(worker: Worker, clock: Clock) -> None:
    try:
        worker.work()
    except TimeUpError:
        clock.errors["time is up"] += 1
    except Exception as error:
        clock.errors[_name_error(error)] += 1


def _name_error(error: BaseException) -> str:
    """The first line of the deepest cause, without numbers that differ from worker to worker."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:160]
