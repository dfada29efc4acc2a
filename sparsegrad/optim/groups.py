"""Parameter groups for `SparseGradAdamW`: one per layer kind, and one for everything else that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.targets import Linears

NamedParameters = list[tuple[str, nn.Parameter]]


def param_groups(
    model: nn.Module,
    linears: Linears,
    bases: Mapping[str, Basis | None],
    *,
    keep: int | None = None,
    density: float | None = None,
    moments: str = "dense",
) -> list[dict[str, Any]]:
    """Groups for `SparseGradAdamW`: one per layer kind, and one for all else that requires a gradient.

    Each group carries the names of its parameters as `param_names`, and those of MLP weights their `kind`.
    """
    named, rest = _named(model, {kind: [one.weight for one in found.values()] for kind, found in linears.items()})
    groups: list[dict[str, Any]] = [
        {
            "params": named[kind],
            "kind": kind,
            "basis": bases[kind],
            "keep": keep,
            "density": density,
            "moments": moments,
        }
        for kind in linears
    ]
    return [*groups, {"params": rest}] if rest else groups


def core_groups(model: nn.Module, blocks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of plain AdamW for `SparseGradAdamW`: the cores of each layer kind, and all else that requires a gradient.

    `blocks` are the `BlockLinear`s of `model`, layer kind -> module name -> layer.

    Each group carries the names of its parameters as `param_names`, those of cores their `kind` and the `weight_shape`
    (out, in) of their weights.
    """
    named, rest = _named(model, {kind: [layer.core for layer in found.values()] for kind, found in blocks.items()})
    shapes = {kind: tuple(next(iter(found.values())).weight.shape) for kind, found in blocks.items()}
    groups: list[dict[str, Any]] = [
        {"params": named[kind], "kind": kind, "weight_shape": shapes[kind]} for kind in blocks
    ]
    return [*groups, {"params": rest}] if rest else groups


def _named(
    model: nn.Module, parameters: Mapping[str, Iterable[torch.Tensor]]
) -> tuple[dict[str, NamedParameters], NamedParameters]:
    """Layer kind -> its parameters by name, in the model's order, and all others that require a gradient."""
    kinds = {id(parameter): kind for kind, found in parameters.items() for parameter in found}
    named: dict[str, NamedParameters] = {kind: [] for kind in parameters}
    rest: NamedParameters = []
    for name, parameter in model.named_parameters():
        kind = kinds.get(id(parameter))
        if kind is not None:
            named[kind].append((name, parameter))
        elif parameter.requires_grad:
            rest.append((name, parameter))
    return named, rest
