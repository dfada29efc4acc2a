"""Whether gradients are finite, decided where they are: the CPU does not wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from sparsegrad.distributed import connected, is_shard


def all_finite(gradients: Iterable[Tensor]) -> Tensor | None:
    """Whether no gradient has an infinite entry or NaN: a bool tensor on a device of theirs; None without gradients.

    Each gradient is read once, a seventh of what AdamW then reads and writes. Of shards (FSDP2) every process tells its
    own, and all get the same answer, so all must call this together. Sparse gradients, which AdamW refuses, are left
    out.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    shard = None
    for gradient in gradients:
        # The comparison of types first: asking a plain tensor for an attribute that it lacks is slow.
        if type(gradient) is not Tensor and is_shard(gradient):
            shard, gradient = gradient, gradient.to_local()  # type: ignore[attr-defined]
        if gradient.numel() and not gradient.is_sparse:
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            alike.setdefault((real.device, real.dtype), []).append(real)
    flags = [_largest(found).isfinite().all() for found in alike.values()]
    if shard is None:
        return None if not flags else flags[0] if len(flags) == 1 else _all(flags)
    # Where FSDP2's own collectives work, which the CPU of an offloaded shard is not.
    flag = _all(flags).to(shard.device_mesh.device_type) if flags else _true(shard.device_mesh.device_type)  # type: ignore[attr-defined]
    return _agree(flag)


def _largest(gradients: list[Tensor]) -> Tensor:
    """Numbers that are finite if all entries of gradients of one device and dtype are; no sum can overflow."""
    if gradients[0].is_cuda:  # a few kernels for all
        return torch.stack(torch._foreach_norm(gradients, float("inf")))
    # On a CPU a maximum norm takes ten times as long as both extremes.
    return torch.stack([extreme for gradient in gradients for extreme in gradient.aminmax()])


def _all(flags: list[Tensor]) -> Tensor:
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def _true(device: str) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=device)


def _agree(flag: Tensor) -> Tensor:
    """Whether `flag` is true in every process."""
    if not connected():
        return flag
    number = flag.int()
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return number.bool()
