"""What `BlockLinear` does with a weight that FSDP2's `fully_shard` has cut into shards; all use of `DTensor` is here.

The frozen weight W (out, in) stays where FSDP2 has put it: each process holds some of its rows, and FSDP2 gathers them
for a forward or backward pass. The core C (c, r) is sharded by rows as well. It holds 1 % of the entries of W, so
gathering it is cheap, and its gradient, its moments and its optimizer step are shared out among the processes. (A
replicated core would be sent as often, since an all-reduce is a reduce-scatter and an all-gather. It would take as many
times more memory as there are processes, and `torch.optim` and gradient clipping do not mix `DTensor`s with tensors.)
U_r and V_c are whole on each process: back-propagation needs all of them for this process's own tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.distributed import is_managed, is_shard
from sparsegrad.errors import UserError

Layout = tuple[Any, Any]
"""Device mesh and placements of a shard."""


def check_shards(linear: nn.Module) -> None:
    """Check that FSDP2 shards `linear` in a way that engine `fast` supports.

    Raises:
        UserError: for tensor parallelism, several sharded dimensions, a linear that is a unit of `fully_shard` itself,
            or shards that are kept on another device than the one that computes.
    """
    weight: Any = linear.weight
    remedy = "call fully_shard on each block of the model and on the model, before prepare"
    if not is_shard(weight):
        raise UserError(
            f"a {type(linear).__name__} is managed by FSDP, and its weight is no shard of FSDP2's: {remedy}"
        )
    cuts = [one for one in weight.placements if not one.is_replicate()]
    # A subclass of Shard marks a weight that tensor parallelism had cut before.
    if not is_managed(linear) or len(cuts) != 1 or type(cuts[0]).__name__ != "Shard":
        raise UserError(
            f"a weight {tuple(weight.shape)} is sharded as {tuple(weight.placements)}, as by tensor parallelism, whose "
            f"processes share their tokens; engine fast supports FSDP2 alone: {remedy}"
        )
    if type(linear) is not nn.Linear:
        raise UserError(f"a {type(linear).__name__} cannot become a core: {remedy}, not on single linears")
    if weight.device.type != weight.device_mesh.device_type:
        raise UserError(
            f"a weight is kept on {weight.device.type} and computed with on {weight.device_mesh.device_type}: leave "
            "CPUOffloadPolicy out, whose shards the cores cannot be merged into"
        )


def new_core(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of `shape` (c, r), sharded by rows if `weight` is a shard; at least float32 (see `BlockLinear`)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if not is_shard(weight):
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    from torch.distributed.tensor import Replicate, Shard, zeros

    found: Any = weight
    placements = [Replicate() if one.is_replicate() else Shard(0) for one in found.placements]
    return zeros(*shape, dtype=dtype, device_mesh=found.device_mesh, placements=placements)


def layout_of(tensor: Tensor) -> Layout | None:
    """Mesh and placements of a shard; None for a whole tensor."""
    return (tensor.device_mesh, tensor.placements) if is_shard(tensor) else None  # type: ignore[attr-defined]


def average_shards(gradient: Tensor, layout: Layout) -> Tensor:
    """The mean of the processes' gradients (c, r) as shards of `layout`: one reduce-scatter."""
    from torch.distributed.tensor import DTensor, Partial

    mesh, placements = layout
    # Divided first: gloo has no mean, and a sum of many processes could overflow.
    parts = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return parts.redistribute(placements=placements)


def own_part(weight: Tensor) -> tuple[Tensor, slice, slice]:
    """The part of `weight` (out, in) that this process holds, as a tensor of the same memory; its rows and columns."""
    if not is_shard(weight):
        return weight, slice(0, weight.shape[0]), slice(0, weight.shape[1])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found: Any = weight
    size, start = compute_local_shape_and_global_offset(found.shape, found.device_mesh, found.placements)
    rows, columns = (slice(first, first + length) for first, length in zip(start, size, strict=True))
    return found.to_local(), rows, columns


def count_writes(tensor: Tensor) -> tuple[int, ...]:
    """Identity of `tensor`, and torch's count of the in-place writes to it and to its shard."""
    # Operations on a DTensor are counted by itself, what loads a checkpoint into its shard by the latter.
    local = getattr(tensor, "_local_tensor", None)
    return (id(tensor), tensor._version, 0 if local is None else local._version)


def check_gathered(core: Tensor, merged_state: tuple[int, ...]) -> None:
    """Check that the weight that FSDP2 has gathered includes the core, and that its policy does not round the core.

    A core that `fully_shard` shards is gathered too, and then says neither when it changed nor how it is stored.

    Args:
        core: of the layer, as it is now.
        merged_state: what `count_writes` gave for it when it was merged.

    Raises:
        UserError: otherwise.
    """
    if is_shard(core) and count_writes(core) != merged_state:
        raise UserError(
            "a core has changed, and the sharded weight does not include it yet: call the whole model, as it was "
            "given to prepare, and not a part of it"
        )
    if core.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"a policy of mixed precision rounds the core to {core.dtype}: call fully_shard before prepare, "
            "which then keeps the cores out of it; or leave param_dtype out and use torch.autocast"
        )


def forget_cores(model: nn.Module, cores: Collection[Tensor]) -> None:
    """Take `cores` out of FSDP2's care, if they were sharded by `fully_shard` after they had been created."""
    removed = set(map(id, cores))
    for module in model.modules():
        if not (is_managed(module) and hasattr(module, "_get_fsdp_state")):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator]
            group.fsdp_params = [one for one in group.fsdp_params if id(one.sharded_param) not in removed]
