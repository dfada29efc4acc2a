"""What SparseGrad refuses of a model in shards, and with what words."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from distributed_cases import batches, bert, loop, messages
from sharded_models import FAST, cut, shard_prepared
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparsegrad import prepare
from sparsegrad.layers.shards import check_shards


def refusals() -> dict[str, str]:
    """What is refused, and with what words."""
    calls = {
        "exact": prepare_exact,
        "small": lambda: prepare_exact(sides="small"),
        "tensor parallel": prepare_tensor_parallel,
        "single linears": shard_single_linears,
        "root alone": shard_root_alone,
        "rounded": round_prepared,
        "a part": call_a_part,
        "fsdp1": prepare_fsdp1,
    }
    return dict(zip(calls, messages(*calls.values()), strict=True))


def prepare_exact(**options: Any) -> None:
    model = bert()
    cut(model)
    prepare(model, batches(), density=0.05, calibration_steps=2, **options)


def prepare_tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model: Any = bert()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {f"bert.encoder.layer.{number}.intermediate.dense": ColwiseParallel() for number in range(2)}
    prepare(parallelize_module(model, mesh, plan), batches(), **FAST)


def shard_single_linears() -> None:
    model: Any = bert()
    for layer in model.bert.encoder.layer:
        fully_shard(layer.output.dense)
    cut(model)
    prepare(model, batches(), **FAST)


def shard_root_alone() -> None:
    model = bert()
    optimizer = prepare(model, batches(), **FAST)
    shard_prepared(model, optimizer, fully_shard)
    loop(model, optimizer, 2)


def round_prepared() -> None:
    model = bert(torch.float32)
    prepare(model, batches(), **FAST)
    cut(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False))
    model(**next(batches()))


def call_a_part() -> None:
    model: Any = bert()
    cut(model)
    optimizer = prepare(model, batches(), **FAST)
    loop(model, optimizer, 1)
    model.bert.encoder.layer[0](torch.zeros(1, 6, 16, dtype=torch.float64))


def prepare_fsdp1() -> None:
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    prepare(wrapper(bert()), batches(), **FAST)


def offloaded() -> str:
    """Shards on another device than the one that computes."""
    model: Any = bert()
    cut(model)
    with patch.object(DeviceMesh, "device_type", "cuda"):
        return messages(lambda: check_shards(model.bert.encoder.layer[0].output.dense))[0]
