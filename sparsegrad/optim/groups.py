"""Parameter groups for `SparseGradAdamW`: one per layer kind, and one for everything else that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.distributed import is_shard
from sparsegrad.optim.rest import rest_groups
from sparsegrad.optim.rotation import Rotation
from sparsegrad.targets import Linears

_LEADING = 4  # columns of a basis that are described: the first ones hardly depend on rounding

NamedParameters = list[tuple[str, nn.Parameter]]


def param_groups(
    model: nn.Module,
    linears: Linears,
    bases: Mapping[str, Basis | None],
    *,
    keep: int | None = None,
    density: float | None = None,
    moments: str = "dense",
    rotations: Mapping[str, Rotation] | None = None,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Groups for `SparseGradAdamW`: one per layer kind, and one for everything else that requires a gradient.

    Each group holds (name, parameter) pairs, from which torch sets `param_names`. Groups of MLP weights have a `kind`.

    Args:
        model: the model that holds `linears`.
        linears: as `find_mlp` returns them.
        bases: layer kind -> basis; None for no rotation.
        keep, density, moments: as for `SparseGradAdamW`.
        rotations: layer kind -> how its gradients are rotated, from `rotate_gradients`; None: by the optimizer.
        decay_vectors: whether weight decay acts on biases and normalization, too: see `prepare`.
    """
    named, rest = _split_parameters(
        model, {kind: [one.weight for one in found.values()] for kind, found in linears.items()}
    )
    groups: list[dict[str, Any]] = [
        {
            "params": named[kind],
            "kind": kind,
            "basis": bases[kind],
            "keep": keep,
            "density": density,
            "moments": moments,
            "rotation": None if rotations is None else rotations[kind],
        }
        for kind in linears
    ]
    return [*groups, *rest_groups(rest, decay_vectors)]


def core_groups(
    model: nn.Module, blocks: Mapping[str, Mapping[str, Any]], decay_vectors: bool = True
) -> list[dict[str, Any]]:
    """Groups of plain AdamW for engine `fast`: the cores of each layer kind, and everything else that trains.

    Each group holds (name, parameter) pairs. Groups of cores have a `kind` and the `weight_shape` (out, in) of their
    weights, by which the optimizer recognizes the engine; and `directions`, by which it recognizes their bases.

    Args:
        model: the model that holds `blocks`.
        blocks: layer kind -> module name -> `BlockLinear`.
        decay_vectors: as for `param_groups`.
    """
    named, rest = _split_parameters(
        model, {kind: [layer.core for layer in found.values()] for kind, found in blocks.items()}
    )
    first = {kind: next(iter(found.values())) for kind, found in blocks.items()}
    groups: list[dict[str, Any]] = [
        {"params": named[kind], "kind": kind, "weight_shape": tuple(layer.weight.shape)}
        # Not of shards: torch's distributed checkpoints refuse a state with more entries than was saved.
        | ({} if is_shard(layer.core) else {"directions": _describe_directions(layer)})
        for kind, layer in first.items()
    ]
    return [*groups, *rest_groups(rest, decay_vectors)]


def with_names(group: dict[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`group`, with numbered names if its parameters have none and those of `others` have: torch mixes neither."""
    others = list(others)
    parameters = group["params"]
    if "param_names" in group or isinstance(parameters, set) or not any("param_names" in other for other in others):
        return group
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if any(isinstance(one, tuple) for one in listed):
        return {**group, "params": listed}
    first = sum(len(other["params"]) for other in others)
    return {**group, "params": listed, "param_names": [f"unnamed.{first + number}" for number in range(len(listed))]}


def _describe_directions(layer: Any) -> list[float]:
    """Products of the leading columns of both bases with a fixed vector: other bases have others."""
    products = []
    for basis in (layer.in_basis, layer.out_basis):
        # Without a pattern: sums, for one, are zero for all directions of centred inputs.
        probe = torch.arange(len(basis), dtype=torch.float64, device="cpu").square().cos()
        products.append(probe @ basis[:, :_LEADING].to("cpu", torch.float64))
    found: list[float] = torch.cat(products).tolist()
    return found


def _split_parameters(
    model: nn.Module, parameters: Mapping[str, Iterable[torch.Tensor]]
) -> tuple[dict[str, NamedParameters], NamedParameters]:
    """Layer kind -> its parameters with names, in the model's order; and all others that require a gradient."""
    # By identity: tensors compare elementwise.
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
