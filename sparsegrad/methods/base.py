"""What all methods share: the protocol `Method`, what a run hands in and gets back, and common helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.calibration.loss import Batch
from sparsegrad.errors import UserError, check_integer
from sparsegrad.optim.selection import check_density, count_kept
from sparsegrad.targets import Linears, all_linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run hands to a method.

    Attributes:
        lr, weight_decay: of every optimizer that the method creates.
        train_rest: whether parameters outside the MLP weights train (the paper), or only the head and the MLP weights.
        is_head: whether the parameter of this name belongs to the head, or trains densely like one.
        has_head: false for a language model, which has no parameters that are new for the task.
        batches: opens an endless stream of training batches; every call yields the same ones.
        calibrated: `(settings, compute) -> (bases, cost)`: returns the bases stored for these settings, or calls
            `compute` and stores its result; settings None: never stored.
        measure: `compute -> (result, cost)`: calls `compute` and measures its time and memory.
        accumulation: backward passes per step of the optimizer.
    """

    lr: float
    weight_decay: float
    train_rest: bool
    is_head: Callable[[str], bool]
    batches: Callable[[], Iterator[Batch]]
    calibrated: Callable[
        [Mapping[str, Any] | None, Callable[[], dict[str, Basis]]], tuple[dict[str, Basis], dict[str, Any]]
    ]
    measure: Callable[[Callable[[], Any]], tuple[Any, dict[str, Any]]] = lambda compute: (compute(), {})
    accumulation: int = 1
    has_head: bool = True


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to train.

    Attributes:
        optimizer: over all trainable parameters.
        trainable: gradient entries that one step uses, counted as in the paper: all trainable parameters, but of the
            MLP weights of SparseGrad and MeProp only the kept entries.
        trainable_per_weight: layer kind -> the same count per MLP weight.
        calibration: cost of reading calibration batches and of what is computed from them, for the record; empty
            without any.
        finish: turns the model in place into an ordinary one that computes the same function, with the weights that
            were trained in float32; does nothing where `notes` say that the method does not merge.
        save: writes an adapter in peft's own format to a folder; None where there is none.
        notes: what the record says of the method's settings, such as the size that a budget gave.
    """

    optimizer: torch.optim.Optimizer
    trainable: int
    trainable_per_weight: dict[str, int]
    calibration: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], object] = lambda: None
    save: Callable[[Path], object] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """One method: a frozen dataclass whose fields are the keys of its YAML, checked when it is created.

    A method that reads bases from a file has `basis_file`, its path or None: a run compares its content with that of
    an earlier one. A method may also have the following, which are false if they are missing:

    - `holds_factors`: whether its layers are `BlockLinear`s, whose change is saved as LoRA without an error;
    - `saves_peft`: whether it is one of peft's, so that an adapter in peft's own format may hold its change;
    - `can_shard`: whether it works on a model that FSDP2 has sharded.

    For the estimate of a run's memory, it may have

    - `count_added(linears) -> int`, if it freezes the MLP weights: the parameters that train in their place;
    - `has_bases`: whether it calibrates U and V of each layer kind, with MLP weights that train meanwhile;
    - `collects_gradients`: whether it holds the gradients of all MLP weights at once before the training;
    - `chooses_rest`: whether it decides itself what trains beside the MLP weights, whatever `train.train_rest` says.
    """

    name: str

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if the settings do not fit these linears; called before anything is computed."""

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """Prepare `model` in place for training; return its optimizer and counts.

        Args:
            model: the model, on its device.
            linears: layer kind -> name -> MLP linear of the model.
            context: what the run hands in.
        """


def freeze(model: nn.Module, linears: Linears, context: Context, *, mlp_weights: bool) -> None:
    """Set which parameters train.

    The head always trains; `context.train_rest` adds everything outside the MLP weights, `mlp_weights` these.

    Raises:
        UserError: if no parameter belongs to the head, although the model has one.
    """
    weights = {id(linear.weight) for linear in all_linears(linears)}
    check_head(model, context)
    for name, parameter in model.named_parameters():
        rest = context.train_rest or context.is_head(name)
        set_trainable(parameter, mlp_weights if id(parameter) in weights else rest)


def check_head(model: nn.Module, context: Context) -> None:
    """Raise `UserError` if no parameter belongs to the head, although the model has one."""
    if context.has_head and not any(context.is_head(name) for name, _ in model.named_parameters()):
        raise UserError(
            f"model.head matches no parameter of {type(model).__name__}: give a regular expression that matches the "
            r"names of those that are new for the task, such as classifier\..*"
        )


def set_trainable(parameter: nn.Parameter, trains: bool) -> None:
    """Set whether a parameter trains. Trainable ones become float32: in bfloat16 most updates would round to zero."""
    parameter.requires_grad_(trains)
    if trains:
        widen(parameter)


def widen(parameter: nn.Parameter) -> None:
    """Make a parameter of half precision float32, in place."""
    if parameter.dtype in (torch.bfloat16, torch.float16):
        parameter.data = parameter.data.float()


def widen_linear(linear: nn.Module) -> None:
    """Make the weight and bias of a linear of half precision float32, in place.

    A frozen weight needs it before a change is merged into it: what is below half of its last digit would be lost. Its
    bias needs the same dtype, or the linear could only be called under autocast.
    """
    for parameter in linear.parameters(recurse=False):
        widen(parameter)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: Iterable[nn.Parameter], context: Context) -> torch.optim.AdamW:
    """Create the AdamW that all methods use: fused, so that comparisons of speed are fair."""
    return torch.optim.AdamW(parameters, lr=context.lr, weight_decay=context.weight_decay, fused=True)


def count_trainable(model: nn.Module, linears: Linears, per_weight: Mapping[str, int]) -> int:
    """Count the trainable parameters outside the MLP weights, plus `per_weight` entries of each MLP weight."""
    weights = {id(linear.weight) for linear in all_linears(linears)}
    rest = sum(parameter.numel() for parameter in trainable_parameters(model) if id(parameter) not in weights)
    return rest + sum(per_weight[kind] * len(found) for kind, found in linears.items())


def check_kept(density: float | None, keep: int | None) -> None:
    """Check that one of `method.density` and `method.keep` is given and in range; `check` compares it with the shapes.

    Raises:
        UserError: if both or none are given, or the value is out of range.
    """
    if (density is None) == (keep is None):
        raise UserError(f"method.density={density} and method.keep={keep}: give one and set the other to null")
    if keep is not None:
        check_integer("method.keep", keep, at_least=1)
    check_density(density)


def kept_per_weight(linears: Linears, density: float | None, keep: int | None) -> dict[str, int]:
    """Return layer kind -> kept entries of each of its weights.

    Raises:
        UserError: if a weight has fewer entries than `keep`.
    """
    return {
        kind: count_kept(shape, keep=keep, density=density, name=f"a weight of kind {kind}")
        for kind, shape in weight_shapes(linears).items()
    }
