"""What an optimizer notices when training stands still: frozen weights, layers that are not called, no finite gradient.

Nothing here makes the CPU wait for a GPU, unless training stands still already.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsegrad.errors import UserError
from sparsegrad.optim.group_checks import name_of
from sparsegrad.optim.later import Later

Groups = list[dict[str, Any]]

_SILENT = 20  # steps after which cores without a gradient are mentioned: a batch may leave out layers, as experts
_INTERVAL = 10  # steps between two looks at the number of skipped ones
_WARNINGS = (10, 100)  # skipped steps in a row at which to warn


class Watch:
    """Watches the steps of one optimizer."""

    def __init__(self) -> None:
        self._watches_frozen = self._watches_cores = True
        self._silent = 0  # steps with gradients, but none so far for a kind of cores
        self._steps = self._in_a_row = self._seen = 0  # all steps; of these skipped in a row, and skipped at all
        self._counts: list[Later] = []  # of skipped steps, not read yet

    def check(self, groups: Groups, state: Mapping[Tensor, Any]) -> None:
        """Before a step: warn of frozen SparseGrad weights; warn of cores whose layers are never called, or refuse."""
        if self._watches_frozen:
            self._watches_frozen = not _warn_of_frozen(groups)
        if self._watches_cores:
            self._check_cores(groups, state)

    def _check_cores(self, groups: Groups, state: Mapping[Tensor, Any]) -> None:
        """After some steps, refuse the next if no core has ever had a gradient; if those of a kind have not, warn.

        In back-propagation every core has a gradient whose layer was called. Which kinds a batch needs is a matter of
        the model, as with experts. Frozen cores do not count: they may train later. Steps without any gradient do not
        count either. A core with a state has had a gradient, as in the steps before a loaded state was saved.
        """
        cores = [group for group in groups if group.get("weight_shape")]
        waiting = [group for group in cores if not _has_trained(group, state)]
        self._watches_cores = bool(waiting)
        waiting = [group for group in waiting if any(core.requires_grad for core in group["params"])]
        self._silent += bool(waiting) and any(_has_gradient(group) for group in groups)
        if self._silent < _SILENT or not waiting:
            return
        if not any(_has_trained(group, state) for group in cores):
            raise UserError(_describe_uncalled(waiting[0]))
        self._watches_cores = False
        warnings.warn(_describe_uncalled(waiting[0]), stacklevel=2)

    def count(self, skipped: Tensor | int, groups: Groups) -> None:
        """After a step: warn if many steps in a row were skipped; `skipped` counts all of them, on a device."""
        self._steps += 1
        if isinstance(skipped, Tensor) and not self._steps % _INTERVAL:
            self._counts.append(Later(skipped))
        while self._counts and self._counts[0].has_arrived:
            seen = int(self._counts.pop(0).number)
            self._in_a_row = self._in_a_row + _INTERVAL if seen - self._seen == _INTERVAL else 0
            self._seen = seen
            if self._in_a_row in _WARNINGS:
                _warn_of_skipped(self._in_a_row, groups)


def _has_gradient(group: dict[str, Any]) -> bool:
    return any(parameter.grad is not None for parameter in group["params"])


def _has_trained(group: dict[str, Any], state: Mapping[Tensor, Any]) -> bool:
    return any(parameter.grad is not None or state.get(parameter) for parameter in group["params"])


def _describe_uncalled(group: dict[str, Any]) -> str:
    layer = name_of(group, 0).removesuffix(".core")
    return (
        f"no core of kind {group['kind']} has had a gradient in {_SILENT} steps, though other parameters have: the "
        f"forward of {layer} and of the other layers of this kind is not called, as when fused code reads their weight."
        ' Engine fast needs that call: make it, or give prepare engine="exact", rotation_order="gradient". If these '
        "layers do not take part yet, freeze their cores with requires_grad_(False) until then"
    )


def _warn_of_frozen(groups: Groups) -> bool:
    """Warn if weights that `prepare` found are frozen; returns whether some are."""
    weights = [
        (group, number, weight)
        for group in groups
        if group.get("kind") is not None
        for number, weight in enumerate(group["params"])
    ]
    frozen = [(group, number) for group, number, weight in weights if not weight.requires_grad and weight.grad is None]
    if frozen:
        warnings.warn(
            f"{len(frozen)} of {len(weights)} SparseGrad weights are frozen and do not train, such as "
            f"{name_of(*frozen[0])}: peft, for one, freezes a whole model. If they are to train, call "
            "requires_grad_(True) on the parameters of optimizer.param_groups",
            stacklevel=2,
        )
    return bool(frozen)


def _warn_of_skipped(count: int, groups: Groups) -> None:
    name = next(_not_finite(groups), None)
    warnings.warn(
        f"the last {count} steps changed nothing, since in each a gradient was not finite"
        f"{f', now that of {name}' if name else ''}; optimizer.skipped_steps counts them. A finite loss may have such "
        "gradients: a root or a norm has one at 0",
        stacklevel=2,
    )


def _not_finite(groups: Groups) -> Iterator[str]:
    """Names of parameters whose gradient is not finite; of a shard, this process's part."""
    for group in groups:
        for number, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            values = local.coalesce().values() if local.is_sparse else local
            if not bool(torch.isfinite(values).all()):
                yield name_of(group, number)
