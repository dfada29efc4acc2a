"""Several processes that train one model, started by `torchrun` or `accelerate launch`; alone, nothing happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sparsegrad.errors import UserError
from sparsegrad.processes import is_main, rank, world_size

__all__ = ["average_", "check_same", "connect", "connected", "from_main", "is_main", "largest", "rank", "world_size"]

Value = TypeVar("Value")


def connect(device: torch.device) -> None:
    """Let the processes of one launcher talk: by NCCL with CUDA, else by gloo. Alone, nothing happens."""
    if world_size() > 1 and not connected():
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu")


def connected() -> bool:
    """Whether there are several processes and they can talk."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes: the gradient of the batch that they share."""
    if connected():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())


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


def _shared(error: UserError) -> UserError:
    """Mark an error that all processes raise, so that only one prints it."""
    error.shared = True
    return error
