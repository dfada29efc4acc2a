"""What each of several processes does in the tests of FSDP2; results are plain arrays and texts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import arrays, batches, bert, loop
from sharded_models import FAST, STEPS, blocks, by_columns, cut, end, shard_prepared, weights
from sharded_refusals import offloaded, refusals
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from sparsegrad import calibrate, find_mlp, prepare, save_adapter, save_lora, to_linears
from sparsegrad.distributed import connected, rank, whole
from sparsegrad.layers.replace import merge_shards


def sharded_first(dtype: torch.dtype, mesh: tuple[int, ...] = (), **options: Any) -> dict[str, Any]:
    """Shard, calibrate, train."""
    model = bert(dtype)
    cut(model, mesh, **options)
    optimizer = prepare(model, batches(), **FAST)
    return end(model, loop(model, optimizer, STEPS), optimizer)


def prepared_first(dtype: torch.dtype) -> dict[str, Any]:
    """Calibrate and prepare whole, then shard, with the optimizer's parameters exchanged, as Accelerate does."""
    model = bert(dtype)
    optimizer = prepare(model, batches(), **FAST)
    shard_prepared(model, optimizer, cut)
    return end(model, loop(model, optimizer, STEPS), optimizer)


def by_ddp(dtype: torch.dtype) -> dict[str, Any]:
    """`prepare(engine="fast")`, then DDP."""
    model = bert(dtype)
    optimizer = prepare(model, batches(), **FAST)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if connected() else model
    return end(model, loop(wrapped, optimizer, STEPS), optimizer)


def checkpointed(folder: str, begin: bool) -> dict[str, Any]:
    """Some steps and a distributed checkpoint, or from that checkpoint to the end."""
    model = bert()
    cut(model)
    optimizer = prepare(model, batches(), **FAST)
    if begin:
        loop(model, optimizer, STEPS)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if begin:
        dcp.save(state, checkpoint_id=folder)
        return {}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return end(model, loop(model, optimizer, STEPS, first=1), optimizer)


def kept(folder: str) -> dict[str, Any]:
    """The files of both adapters, written from shards while a step waits to be merged."""
    model, base = bert(torch.float32), bert(torch.float32)
    cut(model)
    optimizer = prepare(model, batches(), **FAST)
    loop(model, optimizer, 1)
    found = save_lora(model, Path(folder) / "lora", base)
    to_linears(model)
    save_adapter(model, Path(folder) / "adapter", base)
    return {"ranks": found.ranks, "errors": max(found.errors.values())}


def grams() -> dict[str, Any]:
    """The bases of a sharded model."""
    model = bert()
    cut(model)
    mlp = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    found = calibrate(model, batches(), mlp, 4)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    return arrays({kind: basis.in_basis for kind, basis in found.items() if basis.in_basis is not None})


def low_precision() -> dict[str, Any]:
    """A policy that computes in bfloat16 leaves cores and their gradients alone, if the model is sharded first."""
    model = bert(torch.float32)
    cut(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False))
    optimizer = prepare(model, batches(), **FAST)
    model(**next(batches())).loss.backward()
    dtypes = {str(block.core.grad.dtype) for block in blocks(model)}
    before = [whole(block.weight).clone() for block in blocks(model)]
    optimizer.step()
    merge_shards(model)
    after = [whole(block.weight) for block in blocks(model)]
    return {"dtypes": dtypes, "moved": [float((b - a).abs().max()) for a, b in zip(before, after, strict=True)]}


def poisoned() -> list[int]:
    """A NaN in the shard of one process skips the step of all; then a step is taken."""
    model = bert(torch.float32)
    cut(model)
    optimizer = prepare(model, batches(), **FAST)
    core, skipped = blocks(model)[0].core, []
    for poison in (float("nan"), 1.0):
        model(**next(batches())).loss.backward()
        before = whole(core.detach()).clone()
        if rank() == 0:
            core.grad.to_local().view(-1)[0] = poison
        optimizer.step()
        assert torch.equal(before, whole(core.detach())) == (poison != 1.0)
        skipped.append(optimizer.skipped_steps)
        optimizer.zero_grad()
    return skipped


def bfloat16_weights() -> dict[str, Any]:
    """Frozen weights in bfloat16: many small changes of the core, each merged at once, add up in them."""
    model = bert(torch.bfloat16)
    cut(model)
    prepare(model, batches(), **FAST)
    block = blocks(model)[0]
    before = whole(block.weight).float()
    begun = whole(block.core.detach()).clone()
    for _ in range(200):
        with torch.no_grad():
            block.core.add_(2e-5)  # far below the spacing of bfloat16
        merge_shards(model)
    wanted = block.out_basis.float() @ (whole(block.core.detach()) - begun) @ block.in_basis.float().T
    change = whole(block.weight).float() - before
    return {"wanted": wanted.numpy(), "change": change.numpy()}


def everything(folder: str) -> dict[str, Any]:
    """All that two processes are tested with."""
    return {
        "float64": sharded_first(torch.float64),
        "float32": sharded_first(torch.float32),
        "columns": sharded_first(torch.float64, shard_placement_fn=by_columns),
        "prepared first": prepared_first(torch.float64),
        "ddp": by_ddp(torch.float64),
        "saved": checkpointed(f"{folder}/two", begin=True),
        "continued": checkpointed(f"{folder}/two", begin=False),
        "kept": kept(folder),
        "grams": grams(),
        "low precision": low_precision(),
        "bfloat16": bfloat16_weights(),
        "poisoned": poisoned(),
        "refused": refusals(),
        "offloaded": offloaded(),
    }


def by_four(folder: str) -> dict[str, Any]:
    """All that four processes are tested with: uneven shards, copies of shards, and the checkpoint of two."""
    return {
        "float64": sharded_first(torch.float64),
        "copies": sharded_first(torch.float64, mesh=(2, 2)),
        "continued": checkpointed(f"{folder}/two", begin=False),
    }


def dies() -> str:
    """One process is killed between two steps; the others gather, and say what happened."""
    from sparsegrad.trainer.processes import lost_process

    model = bert()
    cut(model)
    optimizer = prepare(model, batches(), **FAST)
    loop(model, optimizer, 1)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        merge_shards(model)
        weights(model)
    except Exception as error:
        return str(lost_process(error))
    return "nothing"
