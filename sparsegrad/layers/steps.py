"""What an optimizer's step must know of this package's layers, whichever optimizer it is: hooks on every step.

A `weight.grad` that a layer has rotated means nothing to another optimizer: it would move the weight at random, learn
nothing and report nothing. A core moved by a kernel that does not count its writes would never reach its weight.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparsegrad.distributed import is_managed
from sparsegrad.errors import UserError
from sparsegrad.optim.adamw import SparseGradAdamW

if TYPE_CHECKING:
    from sparsegrad.layers.block import BlockLinear
    from sparsegrad.layers.lean import LeanLinear
    from sparsegrad.optim.rotation import Rotation

_rotating: weakref.WeakSet[LeanLinear] = weakref.WeakSet()
_blocks: weakref.WeakSet[BlockLinear] = weakref.WeakSet()
_lock = threading.RLock()
_known = 0  # changes of layers so far; what has been found out about an optimizer holds until there are more
_passed: weakref.WeakKeyDictionary[Optimizer, tuple[int, ...]] = weakref.WeakKeyDictionary()
_moved: weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, ...], weakref.WeakSet[BlockLinear]]] = (
    weakref.WeakKeyDictionary()
)  # the layers whose cores an optimizer moves


def watch(layer: LeanLinear | BlockLinear) -> None:
    """From now on, check which optimizer steps the weight of a `LeanLinear`, and note steps of a `BlockLinear`'s core.

    Copies of a layer are watched by a call of their own.
    """
    global _known
    _register()
    _known += 1
    watched: weakref.WeakSet[Any] = _blocks if hasattr(layer, "core") else _rotating
    with _lock:
        watched.add(layer)


def forget(layer: LeanLinear | BlockLinear) -> None:
    """The counterpart of `watch`, for a layer that becomes an ordinary linear."""
    watched: weakref.WeakSet[Any] = _blocks if hasattr(layer, "core") else _rotating
    with _lock:
        watched.discard(layer)
    recheck()


def layers_of(rotation: Rotation) -> list[LeanLinear]:
    """The layers that rotate by `rotation`, of whichever model."""
    return [layer for layer in _members(_rotating) if layer.rotation is rotation]


def recheck() -> None:
    """Check every optimizer anew at its next step: layers begin or end to compute plain gradients."""
    global _known
    _known += 1


@functools.cache
def _register() -> None:
    """Register the hooks once; before the first layer of this package no optimizer is concerned."""
    register_optimizer_step_pre_hook(_check_optimizer)
    register_optimizer_step_post_hook(_merge_cores)


def _check_optimizer(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UserError` before a step that would take rotated gradients for plain ones."""
    state = _describe(optimizer)
    if _passed.get(optimizer) == state or _is_wrapper(optimizer):
        return
    layers = {id(layer.weight): layer for layer in _members(_rotating)}
    held = [
        (group, layers[id(one)]) for group in optimizer.param_groups for one in group["params"] if id(one) in layers
    ]
    # A closure computes the gradients within the step, so that there may be none yet.
    has_closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
    for group, layer in held:
        own, moves = _own_rotation(optimizer, group), has_closure and layer.weight.requires_grad
        if layer.rotation is None and own is not None and own.in_layers:
            raise UserError(
                "a calibration has plain gradients, which the optimizer of an earlier prepare takes for rotated ones: "
                "give prepare rotation_order='gradient', or calibrate before it"
            )
        if own is layer.rotation or layer.rotation is None:  # None: during a calibration, whose gradients are plain
            continue
        if own is not None:
            own.replaced = True  # of which the optimizer itself reports
        elif moves or layer.weight.grad is not None:
            raise _explain(optimizer, layer)
    if all(layer.rotation is not None and layer.rotation is _own_rotation(optimizer, group) for group, layer in held):
        _passed[optimizer] = state


def _describe(optimizer: Optimizer) -> tuple[int, ...]:
    """Numbers that change when the optimizer gets other weights, or when there are other layers; cheap to compare."""
    return (_known, *[number for group in optimizer.param_groups for number in _describe_group(group["params"])])


def _describe_group(weights: list[Tensor]) -> tuple[int, ...]:
    """Its size and both ends: another model's weights in its place differ."""
    return (len(weights), id(weights[0]), id(weights[-1])) if weights else (0,)


def _members(layers: weakref.WeakSet[Any]) -> list[Any]:
    with _lock:  # another thread may prepare a model meanwhile
        return list(layers)


def _is_wrapper(optimizer: Optimizer) -> bool:
    """Whether it passes its steps to an optimizer within, as ZeroRedundancyOptimizer does; that one is checked."""
    return any(isinstance(value, Optimizer) for value in vars(optimizer).values())


def _own_rotation(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """The rotation of the gradients that a group expects; None if it expects plain ones."""
    return group.get("rotation") if isinstance(optimizer, SparseGradAdamW) else None


def _explain(optimizer: Optimizer, layer: LeanLinear) -> UserError:
    weight = layer.describe_weight()
    got = f"{type(optimizer).__name__} got the rotated gradient of {weight}, from which it learns nothing"
    if isinstance(optimizer, SparseGradAdamW):
        return UserError(
            f"{got}, as the layer rotates for the optimizer of another prepare: step with that one, or call "
            "sparsegrad.to_linears(model) and prepare again"
        )
    return UserError(
        f"{got}: step with the optimizer that prepare returned, as in Trainer(..., optimizers=(optimizer, None)); to "
        "train this model with another one, call sparsegrad.to_linears(model) first"
    )


def _merge_cores(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Merge each core that a step has moved, so that who reads the weight without calling the layer sees the step.

    Shards are merged when a forward pass of the whole model begins, before FSDP2 gathers them (`merge_shards`).
    """
    if not _blocks:
        return
    blocks = _find_blocks(optimizer)
    if not isinstance(optimizer, SparseGradAdamW):  # which counts its steps itself
        # As a write to each core: fused kernels, for one, do not count theirs.
        torch.autograd.graph.increment_version([block.core for block in blocks])
    for block in blocks:
        if not is_managed(block):
            block.merge()


def _find_blocks(optimizer: Optimizer) -> list[BlockLinear]:
    state = _describe(optimizer)
    found = _moved.get(optimizer)
    if found is None or found[0] != state:
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        blocks = weakref.WeakSet(block for block in _members(_blocks) if id(block.core) in held)
        found = _moved[optimizer] = state, blocks
    return _members(found[1])
