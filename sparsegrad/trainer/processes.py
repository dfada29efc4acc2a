"""Several processes that a launcher started for one run: connected, kept in agreement, and heard when one is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed as dist

from sparsegrad.distributed import _shared, connected, is_main, rank, world_size
from sparsegrad.errors import UserError

Value = TypeVar("Value")
# How gloo says it; NCCL raises a `DistError`.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")


def connect(device: torch.device) -> None:
    """Let the processes of one launcher talk: by NCCL with CUDA, else by gloo. Alone, nothing happens."""
    if world_size() > 1 and not connected():
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")


def largest(number: int) -> int:
    """The largest of all processes' numbers; this one's own where it is alone."""
    if not connected():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_main(make: Callable[[], Value]) -> Value:
    """What `make` gives in the main process, in every process; a `UserError` there is one everywhere."""
    if not connected():
        return make()
    outcome: list[tuple[Value | None, UserError | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(make(), None)]
        except UserError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    value, failure = outcome[0]
    if failure is not None:
        raise _shared(failure)
    return value  # type: ignore[return-value]


def check_same(name: str, value: str) -> None:
    """Raise `UserError` unless all processes have the same value, such as the key of their configuration."""
    if connected():
        values: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            message = (
                f"{name} differs between the processes ({', '.join(values)}): start all with the same command and seed"
            )
            raise _shared(UserError(message))


def lost_process(error: Exception) -> UserError | None:
    """What to say when `error` is that of a connection whose other end has gone; None for any other error.

    Of all processes that lost it, one says so.
    """
    broken = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _BROKEN)
    if not connected() or not broken:
        return None
    lost = UserError(
        f"process {rank()} of {world_size()} lost the connection to another, which has ended: what that one, or the "
        "launcher's summary, says is the cause; the same command continues from the last checkpoint"
    )
    lost.silent = not _is_first()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher now ends all: first this one says why
    return lost


def _is_first() -> bool:
    """Whether no other process has said it; the launcher's store outlives the processes."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("sparsegrad/lost", 1) == 1)
    except RuntimeError:
        return rank() == 1  # the store was process 0's, which is the one that ended
