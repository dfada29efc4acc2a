"""What each of several processes does in the tests of them; their results are plain arrays and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from experiments.studies.bytes_per_step import Payload
from sparsegrad import SparseGradAdamW, find_mlp, prepare
from sparsegrad.distributed import connected, rank
from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear
from sparsegrad.methods.base import Context, Method
from sparsegrad.methods.full import Full
from sparsegrad.methods.lora import Lora
from sparsegrad.methods.lora_sb import LoraSb
from sparsegrad.methods.meprop import MeProp
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.sparsegrad_authors import SparseGradAuthors
from sparsegrad.methods.sparsegrad_fast import SparseGradFast
from sparsegrad.methods.static_mask import StaticMask

ROWS = 8  # of all processes together
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(rank=2),
    "meprop": MeProp(density=0.05),
    "sparsegrad": SparseGrad(density=0.05, steps=4),
    "sparsegrad small": SparseGrad(density=0.05, steps=4, sides="small", moments="support", drop_padding=True),
    "sparsegrad_authors": SparseGradAuthors(keep=25, steps=4),
    "sparsegrad_fast": SparseGradFast(density=0.05, steps=4),
    "lora_sb": LoraSb(density=0.05, steps=4),
    "static_mask": StaticMask(density=0.05, steps=4),
    "peft": Peft(config={"peft_type": "HRA", "r": 2}),
}
HAS_LORA_GA = "lora_ga_config" in LoraConfig.__dataclass_fields__  # since peft 0.19
if HAS_LORA_GA:
    METHODS["lora_ga"] = Peft(config={"peft_type": "LORA", "init_lora_weights": "lora_ga", "r": 2}, steps=4)


def bert(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Two blocks, width 16, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(dtype)


def batches(first: int = 0) -> Iterator[dict[str, Tensor]]:
    """This process's rows of an endless stream of batches, the same for any number of processes."""
    share = ROWS // (dist.get_world_size() if connected() else 1)
    mine = slice(rank() * share, (rank() + 1) * share) if connected() else slice(ROWS)
    generator = torch.Generator().manual_seed(7 + first)
    while True:
        ids = torch.randint(50, (ROWS, 6), generator=generator)
        yield {"input_ids": ids[mine], "labels": ids.sum(1)[mine] % 2}


def context(model: nn.Module, calibrations: list[Any], train_rest: bool = True) -> Context:
    """Notes the bases that a calibration gives."""

    def calibrated(_: Any, compute: Any) -> Any:
        calibrations.append(compute())
        return calibrations[-1], {}

    return Context(
        lr=1e-3, weight_decay=0.01, train_rest=train_rest, is_head=lambda name: name.startswith("classifier"),
        batches=batches, calibrated=calibrated,
    )  # fmt: skip


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, broadcast_buffers=False) if connected() else model


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """An ordinary loop; the losses, mean over processes."""
    losses = []
    for _, batch in zip(range(steps), batches(first), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if connected():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def walk(name: str, steps: int = 5) -> dict[str, Any]:
    """Train by one method: losses, weights, bases, and which entries of the moments the steps have touched."""
    model, calibrations = bert(), []
    prepared = METHODS[name].prepare(model, find_mlp(model), context(model, calibrations))
    losses = loop(wrapped(model), prepared.optimizer, steps)
    touched = {
        f"{group['kind']} {number}": (prepared.optimizer.state[weight]["exp_avg"] != 0).numpy()
        for group in prepared.optimizer.param_groups if group.get("kind") and group["moments"] == "dense"
        for number, weight in enumerate(group["params"])
    }  # fmt: skip
    prepared.finish()
    bases = {
        kind: basis.out_basis for found in calibrations for kind, basis in found.items() if basis.out_basis is not None
    }
    return {"losses": losses, "weights": arrays(model.state_dict()), "bases": arrays(bases), "touched": touched}


def walk_all() -> dict[str, Any]:
    return {name: walk(name) for name in METHODS}


def walk_prepared(dtype: torch.dtype, wrap_first: bool) -> dict[str, Any]:
    """`prepare` and DDP, in either order; each process's own generator is in another state, as with dropout."""
    model = bert(dtype)
    inner, model = model, wrapped(model) if wrap_first else model
    optimizer = prepare(model, batches(), density=0.05, calibration_steps=4, lr=1e-3)
    torch.manual_seed(100 + rank())
    losses = loop(model if wrap_first else wrapped(model), optimizer, 5)
    weights = arrays({name: tensor.float() for name, tensor in inner.state_dict().items()})
    return {"losses": losses, "weights": weights, "names": optimizer.param_groups[0]["param_names"]}


def walk_fast_bfloat16() -> dict[str, Any]:
    """Frozen weights in bfloat16 take the core's changes rounded at random."""
    model = bert(torch.float32)
    prepared = METHODS["sparsegrad_fast"].prepare(model, find_mlp(model), context(model, []))
    blocks = [module for module in model.modules() if isinstance(module, BlockLinear)]
    for block in blocks:
        block.weight.data = block.weight.data.bfloat16()
    before = [block.weight.clone() for block in blocks]
    torch.manual_seed(100 + rank())
    with torch.autocast("cpu", torch.bfloat16):  # inputs in float32 are refused elsewhere, as by nn.Linear
        loop(wrapped(model), prepared.optimizer, 3)
    moved = sum(int((block.weight != was).sum()) for block, was in zip(blocks, before, strict=True))
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return {"weights": arrays(weights), "moved": moved}


def payload(name: str) -> dict[str, int]:
    """Bytes that one step of a method hands to the all-reduce, when only MLP weights and head train."""
    model, counted = bert(torch.float32), Payload()
    prepared = METHODS[name].prepare(model, find_mlp(model), context(model, [], train_rest=False))
    parallel: Any = wrapped(model)
    counted.watch(parallel)
    loop(parallel, prepared.optimizer, 3)
    trainable = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    mlp = sum(size for name, size in trainable.items() if not name.startswith("classifier"))
    return {"per_step": counted.bytes // 3, "mlp": 4 * mlp, "head": 4 * (sum(trainable.values()) - mlp)}


def payloads() -> dict[str, dict[str, int]]:
    return {name: payload(name) for name in ("full", "lora", "meprop", "sparsegrad", "sparsegrad_fast")}


def saved(folder: str, steps: int, begin: bool) -> dict[str, Any]:
    """Begin and save, or load and go on, for some steps of full batches; the weights."""
    model: Any = bert()
    optimizer = prepare(model, batches(), density=0.05, calibration_steps=4, lr=1e-3)
    path = f"{folder}/state.pt"
    if not begin:
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
    loop(wrapped(model), optimizer, steps, first=0 if begin else 1)
    if begin and rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return arrays(model.state_dict())


def messages(*calls: Any) -> list[str]:
    """What each call is refused with; empty where it is not."""
    found = []
    for call in calls:
        try:
            call()
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def refused_by_the_library() -> list[str]:
    """Another seed on each process, for the whole model and for a frozen part; gradients released one by one."""
    other = bert(seed=rank())
    optimizer = prepare(bert(), batches(), density=0.05, calibration_steps=2)
    return messages(
        lambda: prepare(other, batches(), density=0.05, calibration_steps=2),
        lambda: optimizer.release_gradients(),
    )


def refused_shards() -> list[str]:
    """A model cut up by `fully_shard`: to prepare, as a group, and in an optimizer made before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = bert()
    before = prepare(model, batches(), density=0.05, calibration_steps=2)
    mlp = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = [linear.weight for linear in mlp["output"]]
    before.param_groups[0]["params"] = weights  # as Accelerate does
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return messages(
        lambda: prepare(model, batches(), density=0.05, calibration_steps=2),
        lambda: SparseGradAdamW([{"params": weights, "density": 0.05}]),
        lambda: before.step(),
    )
