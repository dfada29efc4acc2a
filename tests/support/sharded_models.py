"""A small BERT cut into shards, and what its training leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed_cases import arrays, batches
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sparsegrad import BlockLinear, to_linears
from sparsegrad.distributed import connected, gathered, whole

DENSITY, STEPS = 0.05, 3
FAST: dict[str, Any] = {"engine": "fast", "density": DENSITY, "calibration_steps": 4, "lr": 1e-3, "weight_decay": 0.01}


def cut(model: Any, mesh: tuple[int, ...] = (), **options: Any) -> None:
    """FSDP2 on each block and on the model, if there are several processes."""
    if not connected():
        return
    sizes = mesh or (dist.get_world_size(),)
    found = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=found, **options)
    fully_shard(model, mesh=found, **options)


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Cut the MLP weights by columns, everything else by rows."""
    return Shard(1) if parameter.dim() == 2 and 32 in parameter.shape else None


def weights(model: Any) -> dict[str, Any]:
    """All weights, whole, in the main process; the others return nothing."""
    with gathered(model) as main:
        return arrays(model.state_dict()) if main else {}


def blocks(model: nn.Module) -> list[BlockLinear]:
    return [module for module in model.modules() if isinstance(module, BlockLinear)]


def end(model: Any, losses: list[float], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Losses, moments of the cores, and weights as ordinary linears, after forward passes without back-propagation."""
    with torch.no_grad():
        model(**next(batches()))
    cores = [whole(optimizer.state[block.core]["exp_avg"]).numpy().copy() for block in blocks(model)]
    to_linears(model)
    assert not any("core" in name or "merged" in name for name in model.state_dict())
    with torch.no_grad():
        losses = [*losses, mean(model(**next(batches())).loss)]
    return {"losses": losses, "cores": cores, "weights": weights(model)}


def mean(loss: torch.Tensor) -> float:
    if connected():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def shard_prepared(model: Any, optimizer: torch.optim.Optimizer, shard: Callable[[Any], Any]) -> None:
    """Shard the model, and give the optimizer the sharded parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shard(model)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
