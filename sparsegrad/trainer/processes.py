"""Several processes of one run: connect them, keep them in agreement, and report when one is lost."""

from __future__ import annotations

import os
import signal
import threading

import torch
from torch import distributed as dist

from sparsegrad.distributed import connected, mark_shared, rank, world_size
from sparsegrad.errors import ResourceError, UserError

_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Messages of gloo, which raises a plain RuntimeError; NCCL raises a `DistError`.
_CONNECTION_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")


def connect(device: torch.device) -> None:
    """Connect the processes that a launcher started: by NCCL on CUDA, otherwise by gloo. A single one needs nothing.

    Raises:
        UserError: where the environment tells of several processes but not how to connect them. Each would train
            alone, on its part of the rows.
    """
    if world_size() > 1 and not connected():
        if missing := [name for name in _OF_LAUNCHER if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE={world_size()} is set, but not {', '.join(missing)}: start with torchrun or accelerate "
                "launch, or unset WORLD_SIZE for a single process"
            )
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")


def largest(number: int) -> int:
    """Return the largest of the processes' numbers; a single process returns its own."""
    if not connected():
        return number
    # NCCL reduces only tensors on the GPU.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def check_same(name: str, value: str) -> None:
    """Check that all processes have the same value, such as the key of their configuration.

    Raises:
        UserError: if they do not.
    """
    if connected():
        values: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise mark_shared(
                UserError(
                    f"{name} differs between the processes ({', '.join(values)}): start all with the same command and "
                    "the same seed"
                )
            )


def is_of_connection(error: Exception) -> bool:
    """Whether `error` means that another process has ended."""
    broken = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _CONNECTION_ERRORS)
    return connected() and broken


def lost_process(error: Exception) -> ResourceError | None:
    """Return the error to report if `error` means that another process has ended; None for any other error.

    Only the first process that notices prints it; in the others the error is silent.
    """
    if not is_of_connection(error):
        return None
    lost = ResourceError(
        f"process {rank()} of {world_size()} lost the connection to another, which has ended: for the cause see its "
        "output, or the launcher's summary; the same command continues from the last checkpoint, if one was written"
    )
    lost.silent = not _is_first_to_report()
    if threading.current_thread() is threading.main_thread():
        # The launcher now terminates all processes; this one must first print its message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return lost


def _is_first_to_report() -> bool:
    """Whether no other process has reported the loss; the launcher's store outlives the processes."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("sparsegrad/lost", 1) == 1)
    except RuntimeError:
        return rank() == 1  # process 0 held the store, and is the one that ended
