"""A stand-in for `sparsegrad.runs.run` that needs no model: a smooth function of the learning rate, in milliseconds.

It keeps the promises that sweeps rely on: callbacks see each evaluation, a record is left in either case, a run whose
record exists is skipped, two processes never work on the same run. `protocol.patience` is how many milliseconds a run
takes; null: none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock, Timeout

from sparsegrad.errors import BusyError, FailedRunError, UserError
from sparsegrad.files import write_json
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.records import find_complete

EVALUATIONS = 4


def score(lr: float) -> float:
    """Best at 1e-3."""
    return 1 / (1 + (math.log10(lr) + 3) ** 2)


def run(config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Like `sparsegrad.runs.run`; diverges above a rate of 0.5 and scores NaN from 0.2 on."""
    lock = Path(config.work_dir) / f"{config.key}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            return _run(config, callbacks, labels)
    except Timeout:
        raise BusyError(f"run {config.key} is at work in another process") from None


def crash(
    config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A programming error."""
    raise ZeroDivisionError("a programming error\nwhose message has a second line")


def refuse(
    config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A mistake that no trial survives."""
    raise UserError("the model is not there")


def diverge(
    config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A run that diverges while an earlier record stays."""
    callbacks[0].on_train_begin(None, SimpleNamespace(log_history=[]), None)
    raise FailedRunError("the loss is not a finite number")


def fill_disk(
    config: RunConfig, *, callbacks: Sequence[Any] = (), labels: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """A fault in training that leaves no record, and is no fault of the values."""
    _tell("on_train_begin", callbacks, SimpleNamespace(global_step=0, max_steps=EVALUATIONS, log_history=[]))
    raise UserError("the disk is full")


def _run(config: RunConfig, callbacks: Sequence[Any], labels: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    found = find_complete(config.record_path)
    if found is not None:
        return found, False
    record = {"schema": 1, "key": config.key, **labels, "config": config.resolved}
    try:
        evaluations = _evaluations(config, callbacks)
    except UserError as error:
        write_json(config.record_path, {**record, "status": "failed", "reason": str(error)})
        raise
    result = {"metric": "accuracy", "chosen_step": EVALUATIONS}
    record |= {"status": "complete", "result": result, "evaluations": evaluations}
    write_json(config.record_path, record)
    return record, True


def _evaluations(config: RunConfig, callbacks: Sequence[Any]) -> list[dict[str, Any]]:
    state = SimpleNamespace(global_step=0, max_steps=EVALUATIONS, log_history=[])
    seconds, lr = (config.protocol.patience or 0) / 1000, config.train.lr
    _tell("on_train_begin", callbacks, state)
    for step in range(1, EVALUATIONS + 1):
        time.sleep(seconds / EVALUATIONS)
        if lr > 0.5:
            raise UserError("the loss is not a finite number at step 1: training diverged")
        value = math.nan if lr > 0.2 else score(lr) * step / EVALUATIONS
        state.global_step = step
        state.log_history.append({"step": step, "eval_accuracy": value})
        _tell("on_step_end", callbacks, state)
        _tell("on_evaluate", callbacks, state)
    _tell("on_train_end", callbacks, state)
    return [{"step": row["step"], "accuracy": row["eval_accuracy"]} for row in state.log_history]


def _tell(event: str, callbacks: Sequence[Any], state: Any) -> None:
    for callback in callbacks:
        getattr(callback, event)(None, state, None)
