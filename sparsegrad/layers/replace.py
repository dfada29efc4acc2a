"""Engine `fast` in a model: `BlockLinear`s in the places of its MLP linears, and ordinary linears again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear, core_shape, share_bases
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.targets import Linears, weight_shapes

Blocks = dict[str, dict[str, BlockLinear]]
"""Layer kind -> module name -> the layer, in the model's order."""
LAYERS = (BlockLinear, SparseGradLinear)  # whose parameters are not those of a linear, as those of `LeanLinear` are
Model = TypeVar("Model", bound=nn.Module)


def use_blocks(model: nn.Module, linears: Linears, bases: Mapping[str, Basis], density: float) -> Blocks:
    """Put a `BlockLinear` in the place of each of `linears`; its weight is frozen, its bias trains if it did.

    Args:
        model: changed in place.
        linears: of `model`, as `find_mlp` gives them.
        bases: layer kind -> basis of both sides; the layers of a kind share its leading columns.
        density: share of a weight's entries that its core (c, r) has, (0, 1].

    Raises:
        UserError: for what `BlockLinear.from_linear` refuses, or a density out of range.
    """
    blocks: Blocks = {}
    for kind, shape in weight_shapes(linears).items():
        found, core = linears[kind], core_shape(shape, density)
        layers = [BlockLinear.from_linear(linear, bases[kind], core) for linear in found.values()]
        share_bases(layers)
        for (name, linear), layer in zip(found.items(), layers, strict=True):
            replace_linear(model, name, linear, layer)
        blocks[kind] = dict(zip(found, layers, strict=True))
    return blocks


def to_linears(model: Model) -> Model:
    """Turn every `BlockLinear`, `SparseGradLinear` and `LeanLinear` of `model` into the linear of the same function.

    So after training the model is saved, exported, and compared with its base like any other. A model without such
    layers stays as it is. The optimizer goes on holding the layers that are gone: train on with a new `prepare`.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        UserError: for such a layer alone, which no model holds.
    """
    if isinstance(model, LAYERS):
        raise UserError(f"the model is itself a {type(model).__name__}: take what its to_linear() gives")
    made: dict[int, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (*LAYERS, LeanLinear)):
            if id(module) not in made:
                made[id(module)] = module.to_linear()
            replace_linear(model, name, module, made[id(module)])
    return model


def refuse_layers(model: nn.Module) -> None:
    """Raise `UserError` for a model with layers that `to_linears` would turn: no base has their parameters."""
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
    """Put `layer` in the place of `linear`; its bias trains if the linear's did."""
    if layer.bias is not None and linear.bias is not None:
        layer.bias.requires_grad_(linear.bias.requires_grad)
    replace_module(model, name, layer)
