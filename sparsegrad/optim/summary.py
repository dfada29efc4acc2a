"""A summary of what an optimizer trains: the weights, their shapes, and how many entries."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsegrad.arguments import explained
from sparsegrad.errors import UserError
from sparsegrad.optim.selection import count_kept


@dataclass(frozen=True)
class Taken:
    """The weights of one layer kind.

    Attributes:
        kind: the layer kind.
        names: names of the weights in the original model, in its order.
        shape: shape of each weight as stored: (out, in), or (in, out) for GPT-2's `Conv1D`.
        kept: number of entries of each weight that one step changes in the rotated space.
        core: shape (c, r) of the core with engine `fast`; otherwise None.
        frozen: number of these weights, or of their cores, that do not train (`requires_grad=False`).
    """

    kind: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    kept: int
    core: tuple[int, int] | None = None
    frozen: int = 0

    @property
    def all_kept(self) -> int:
        """Number of entries of all these weights that one step changes in the rotated space."""
        return (len(self.names) - self.frozen) * self.kept


@dataclass(frozen=True)
class Plan:
    """What one optimizer trains; `print(plan)` shows a table.

    Attributes:
        taken: the SparseGrad weights by kind.
        rest: number of other parameters, which plain AdamW trains; frozen ones are not counted.
        model_size: number of parameters of the model as it is now, frozen ones included, without the cores of engine
            `fast`; as it was given, if it is gone; None if `prepare` did not make the optimizer.
    """

    taken: tuple[Taken, ...]
    rest: int
    model_size: int | None = None

    @property
    def kept(self) -> int:
        """Number of entries of all SparseGrad weights that one step changes in the rotated space."""
        return sum(group.all_kept for group in self.taken)

    @property
    def mlp_size(self) -> int:
        """Number of entries of all SparseGrad weights."""
        return sum(len(group.names) * group.shape[0] * group.shape[1] for group in self.taken)

    @property
    def trainable(self) -> int:
        """Number of gradient entries that one step uses, as the paper counts: the kept entries and all of the rest."""
        return self.rest + self.kept

    def __str__(self) -> str:
        # A header and one row per layer kind, then padded to aligned columns.
        rows: list[tuple[str, ...]] = [("kind", "weights", "shape", "core", "kept of each", "density", "first")]
        for group in self.taken:
            size = group.shape[0] * group.shape[1]
            counts = (
                f"{len(group.names)} ({group.frozen} frozen)" if group.frozen else str(len(group.names)),
                _format_shape(group.shape),
                _format_shape(group.core),
                f"{group.kept:,} of {size:,}",
            )
            rows.append((group.kind, *counts, f"{group.kept / size:.3%}", group.names[0]))
        if not any(group.core for group in self.taken):
            rows = [(*row[:3], *row[4:]) for row in rows]  # no column for cores
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._format_totals()])

    def _format_totals(self) -> list[str]:
        """One line for the target weights and the rest, then the total in the format of `peft`."""
        targets = f"target weights: {self.kept:,} of {self.mlp_size:,} ({self.kept / self.mlp_size:.2%})"
        if self.model_size is None:
            return [f"{targets}; rest: {self.rest:,} by AdamW", f"trainable params: {self.trainable:,}"]
        rest = f"rest: {self.rest:,} of {self.model_size - self.mlp_size:,} by AdamW"
        share = 100 * self.trainable / self.model_size
        total = f"trainable params: {self.trainable:,} || all params: {self.model_size:,} || trainable%: {share:.4f}"
        return [f"{targets}; {rest}", total]


def _format_shape(shape: tuple[int, int] | None) -> str:
    return "" if shape is None else f"{shape[0]} x {shape[1]}"


@explained()
def describe(optimizer: Any) -> Plan:
    """Summarize an optimizer that `prepare` returned; it may be wrapped by Accelerate or a Trainer.

    Parameters count as they are now: one that has been frozen since does not train.

    Raises:
        UserError: for another optimizer, or for the model.
    """
    if isinstance(optimizer, nn.Module):  # in peft, `print_trainable_parameters` is a method of the model
        raise UserError(
            f"{type(optimizer).__name__} is a model: give the optimizer that sparsegrad.prepare returned, which knows "
            "what trains"
        )
    groups = getattr(optimizer, "param_groups", [])
    taken = tuple(_summarize_group(group) for group in groups if group.get("kind") is not None)
    if not taken:
        raise UserError(f"{type(optimizer).__name__} has no SparseGrad weights: give what sparsegrad.prepare returned")
    rest = [parameter for group in groups if group.get("kind") is None for parameter in group["params"]]
    trained = sum(parameter.numel() for parameter in rest if parameter.requires_grad)
    return Plan(taken, trained, _read_size(getattr(optimizer, "optimizer", optimizer)))  # Accelerate's wrapper has none


def _read_size(optimizer: Any) -> int | None:
    reference = getattr(optimizer, "model", None)
    model = reference() if isinstance(reference, weakref.ref) else None
    size: int | None = getattr(optimizer, "model_size", None)
    return size if model is None else count_parameters(model)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, without what engine `fast` adds to its layers."""
    added = {
        id(module._parameters.get(name))
        for module in model.modules()
        if "in_basis" in module._buffers  # a `BlockLinear`
        for name in ("core", "merged")
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in added)


def _summarize_group(group: dict[str, Any]) -> Taken:
    weight: torch.Tensor = group["params"][0]
    frozen = sum(not parameter.requires_grad for parameter in group["params"])
    if group.get("weight_shape"):  # engine `fast`: the parameter is the core, beside the frozen weight
        core = (weight.shape[0], weight.shape[1])
        return Taken(group["kind"], list_weights(group), group["weight_shape"], weight.numel(), core, frozen)
    kept = count_kept(weight.shape, keep=group["keep"], density=group["density"])
    shape = (weight.shape[0], weight.shape[1])
    return Taken(group["kind"], list_weights(group), shape, kept, frozen=frozen)


def list_weights(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the weights that a group with a `kind` trains, if need be by the cores of engine `fast`."""
    names = tuple(group["param_names"])
    return tuple(f"{name.removesuffix('core')}weight" for name in names) if group.get("weight_shape") else names


@explained()
def print_trainable_parameters(optimizer: Any) -> None:
    """Print one line with what trains and how it is counted, as `peft`'s method of this name does.

    The target weights and everything else are counted apart. Of a target weight, engine `exact` changes a few rotated
    entries per step, which it selects again in each step; engine `fast` trains a core beside the frozen weight.

    Args:
        optimizer: what `prepare` returned; it may be wrapped by Accelerate or a Trainer.

    Raises:
        UserError: for another optimizer, or for the model.
    """
    plan = describe(optimizer)
    counted = "as cores" if any(group.core for group in plan.taken) else "in each step"
    parts = [f"target weights {_format_share(plan.kept, plan.mlp_size)} {counted}"]
    if plan.model_size is None:
        parts += [f"rest {plan.rest:,}", f"together {plan.trainable:,}"]
    else:
        parts.append(f"rest {_format_share(plan.rest, plan.model_size - plan.mlp_size)}")
        parts.append(f"together {_format_share(plan.trainable, plan.model_size)}")
    print("trainable: " + "; ".join(parts))


def _format_share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({part / whole:.2%})" if whole else "")
