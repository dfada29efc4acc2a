"""Put this package's layers into a model for an engine, and turn all of them back into linears."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from sparsegrad.arguments import explained
from sparsegrad.basis import Basis
from sparsegrad.distributed import is_managed, is_shard, reshard
from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import check_linear, core_shape
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.layers.shards import forget_cores
from sparsegrad.optim.rotation import Rotation, check_rotation_dtype
from sparsegrad.targets import Linears, all_linears, weight_shapes

Blocks = dict[str, dict[str, BlockLinear]]
"""Layer kind -> module name -> the layer, in the model's order."""
LAYERS = (BlockLinear, SparseGradLinear)  # their parameters differ from those of a linear; `LeanLinear`'s do not
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
Model = TypeVar("Model", bound=nn.Module)


def use_blocks(model: nn.Module, linears: Linears, bases: Mapping[str, Basis], density: float) -> Blocks:
    """Replace each of `linears` by a `BlockLinear`, whose weight is frozen and whose bias trains if it did before.

    The linears become such layers in place, without a copy of their weights. A subclass of `nn.Linear` that computes
    the same is replaced by a new layer, which takes over its weight and its hooks.

    Args:
        model: changed in place.
        linears: linears of `model`, as `find_mlp` returns them.
        bases: layer kind -> basis of both sides; the layers of a kind share its leading columns.
        density: share of a weight's entries that its core (c, r) has, in (0, 1].

    Returns:
        Layer kind -> module name -> the new layer.

    Raises:
        UserError: as `BlockLinear.from_linear`, for a density out of range, or for a linear with a function of its own.

    After any error `model` has the linears and the function that it had. Weights that were converted before it have no
    gradient then, and linears of engine `exact` may leave the rotation to their optimizer, as after `to_linears`.
    """
    for name, linear in ((name, linear) for found in linears.values() for name, linear in found.items()):
        check_linear(linear, "a block")
        refuse_own_function(linear, name)
    reshard(model)
    blocks = _make_blocks(linears, bases, density)
    for kind, found in linears.items():
        for name, linear in found.items():
            if id(blocks[kind][name]) != id(linear):  # otherwise it has become the layer
                replace_linear(model, name, linear, blocks[kind][name])
    # First of the hooks: FSDP2's own gathers the weights. If the model is sharded later, that one comes first and has
    # gathered the root's parameters, but those of no block.
    if merge_shards not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(merge_shards, prepend=True)
    return blocks


def _make_blocks(linears: Linears, bases: Mapping[str, Basis], density: float) -> Blocks:
    """The layers of `use_blocks`: all, or none if one of them fails, as for lack of memory."""
    blocks: Blocks = {}
    before = [(one, one.weight.requires_grad) for one in all_linears(linears) if not isinstance(one, BlockLinear)]
    try:
        for kind, shape in weight_shapes(linears).items():
            core = core_shape(shape, density)
            blocks[kind] = {name: _make_block(linear, bases[kind], core) for name, linear in linears[kind].items()}
            share_bases(list(blocks[kind].values()))
    except BaseException:
        for linear, trained in before:
            if isinstance(linear, BlockLinear):
                linear.discard_core()
                linear.weight.requires_grad_(trained)
        raise
    return blocks


def share_bases(layers: Sequence[BlockLinear]) -> None:
    """Let layers of one basis and one core shape share the same two matrices, which saves memory."""
    for layer in layers[1:]:
        layer.in_basis, layer.out_basis = layers[0].in_basis, layers[0].out_basis


def refuse_own_function(linear: nn.Module, name: str) -> None:
    """Raise `UserError` for a linear whose function a `BlockLinear` would not have, such as one with a scale."""
    kind, usual = type(linear), (nn.Linear.forward, LeanLinear.forward)
    # Accelerate's hooks, which only move tensors, put the former one aside.
    patched = vars(linear).get("_old_forward" if hasattr(linear, "_hf_hook") else "forward")
    inherits = kind.forward in usual and (patched is None or getattr(patched, "__func__", None) in usual)
    own = {*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}
    if not inherits or own:
        reason = f"has {', '.join(sorted(own))} of its own" if inherits else "has a forward of its own"
        raise UserError(
            f'{name} is a {kind.__name__} and {reason}, which a layer of engine="fast" would not compute: give '
            'engine="exact", or leave it out'
        )


def _make_block(linear: nn.Linear, basis: Basis, core: tuple[int, int]) -> BlockLinear:
    if is_managed(linear) or is_shard(linear.weight) or computes_gradient(linear):
        if isinstance(linear, LeanLinear):  # of an earlier call with engine `exact`
            linear.restore()
        return BlockLinear.convert(linear, basis, core)
    # Shared, not copied: who still holds the old linears would otherwise keep a second copy of all MLP weights.
    return BlockLinear(linear.weight.detach(), linear.bias, basis, core)


def merge_shards(model: nn.Module, *_: Any) -> None:
    """Merge the cores of a model that FSDP2 shards; each process changes its own rows of the weights.

    It runs as a hook when a forward pass of the model begins. All processes must call it together. Without shards it
    does nothing, because each layer merges its core itself.
    """
    if not is_managed(model):
        return
    blocks = [module for module in model.modules() if isinstance(module, BlockLinear)]
    if any(is_managed(block) and not is_shard(block.weight) for block in blocks):
        reshard(model)
    for block in blocks:
        block.merge()


def rotate_gradients(
    linears: Linears,
    bases: Mapping[str, Basis],
    *,
    order: str = "auto",
    dtype: torch.dtype | None = None,
    drop_padding: bool = False,
    save_dtype: torch.dtype | None = None,
) -> dict[str, Rotation]:
    """Let the linears of engine `exact` compute rotated gradients, in the cheapest order of products.

    Each linear becomes a `LeanLinear` in place. With `order="gradient"`, and for a kind with a module that cannot
    compute its own gradient (GPT-2's `Conv1D`, a subclass or a patched `forward`), the optimizer rotates plain
    gradients. Gradients that the weights have from before are deleted.

    Args:
        linears: linears of one model, as `find_mlp` returns them; changed in place.
        bases: layer kind -> basis of both sides or one.
        order: one of `sparsegrad.optim.orders.ORDERS`.
        dtype: see `Rotation`.
        drop_padding, save_dtype: see `LeanLinear`.

    Returns:
        Layer kind -> its rotation, for `param_groups`.

    Raises:
        UserError: for an unknown order, a dtype that the device lacks, or as `LeanLinear`.
    """
    check_rotation_dtype(dtype, next(all_linears(linears)).weight.device)
    rotations = {}
    for kind, found in linears.items():
        rotation = rotations[kind] = _find_rotation(found.values(), Rotation(bases[kind], order, dtype))
        rotation.in_layers = order != "gradient" and all(map(computes_gradient, found.values()))
        for name, linear in found.items():
            linear.weight.grad = None  # of an earlier pass, in whatever space: it must not be added to the next ones
            if rotation.in_layers or drop_padding or save_dtype is not None:
                check_linear(linear, "a lean linear", "leave drop_padding and save_dtype off")
                own = rotation if rotation.in_layers else None
                LeanLinear.convert(linear, rotation=own, drop_padding=drop_padding, save_dtype=save_dtype, name=name)
            elif isinstance(linear, LeanLinear):  # of an earlier call
                linear.restore()
    return rotations


def _find_rotation(linears: Collection[nn.Module], wanted: Rotation) -> Rotation:
    """`wanted`, or the equal rotation of an earlier call: then the optimizer of that call stays valid, too."""
    earlier = {id(rotation): rotation for one in linears if (rotation := getattr(one, "rotation", None)) is not None}
    return next((rotation for rotation in earlier.values() if rotation.equals(wanted)), wanted)


def computes_gradient(linear: nn.Module) -> bool:
    """Whether a module's function is that of its class, and the class an `nn.Linear`, so that `LeanLinear` fits."""
    return type(linear) in (nn.Linear, LeanLinear) and "forward" not in vars(linear)


@explained()
def to_linears(model: Model) -> Model:
    """Replace every `BlockLinear`, `SparseGradLinear` and `LeanLinear` by an `nn.Linear` with the same function.

    A model that FSDP2 shards stays sharded; all processes must call this together.

    Call it after training: the model can then be saved, exported and compared with its base like any other. A model
    without such layers is not changed. After engine `fast` the optimizer still refers to the removed cores: to
    continue training, call `prepare` again. After engine `exact` the same optimizer can continue, and rotates the
    gradients itself: those of all layers of a kind, also where `model` is a part that has only some of them. Call it
    after a step, because rotated gradients are deleted.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        UserError: when `model` itself is such a layer, which cannot be replaced in place.
    """
    if isinstance(model, LAYERS):
        raise UserError(f"the model is itself a {type(model).__name__}: use what its to_linear() returns")
    reshard(model)
    for module in model.modules():  # `model` may be a wrapper around the one that was prepared
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is merge_shards]:
            del module._forward_pre_hooks[key]
    made: dict[int, nn.Linear] = {}  # id of a layer -> its linear: a layer with two names stays one module
    # A list, since the loop changes the tree; with duplicates, so that every name of a shared layer is replaced.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LeanLinear):
            module.restore()  # in place: its names and hooks stay
        elif isinstance(module, BlockLinear):
            core, merged = module.core, module.merged
            module.restore()
            forget_cores(model, (core, merged))
        elif isinstance(module, LAYERS):
            if id(module) not in made:
                made[id(module)] = module.to_linear()
            replace_linear(model, name, module, made[id(module)])
    return model


def refuse_layers(model: nn.Module) -> None:
    """Raise `UserError` for a model with layers whose parameters no base model has; `to_linears` removes them."""
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            raise UserError(
                f"{name or 'the model'} is a {type(module).__name__}, which no base has: call "
                "sparsegrad.to_linears(model) first, then save"
            )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name` of `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replace_linear(model: nn.Module, name: str, linear: Any, layer: Any) -> None:
    """Put `layer` in the place of `linear`, with its hooks and its mode; its bias trains if that of the linear did."""
    if layer.bias is not None and linear.bias is not None:
        layer.bias.requires_grad_(linear.bias.requires_grad)
    for hooks in _HOOKS:  # the same objects, so that the handles that the user holds still remove hooks
        setattr(layer, hooks, getattr(linear, hooks))
    layer.train(linear.training)
    replace_module(model, name, layer)
