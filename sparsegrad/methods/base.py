"""What every method does: take a model and its MLP linears, say what trains, give the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import Batch
from sparsegrad.errors import UserError, check_integer
from sparsegrad.optim.selection import check_density, count_kept
from sparsegrad.targets import Linears, all_linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method gets from the run.

    Attributes:
        lr, weight_decay: of every optimizer the method makes.
        train_rest: whether parameters outside the MLP weights train (the paper) or only the head and the MLP weights.
        is_head: tells by its name whether a parameter belongs to the head, or trains densely like one.
        has_head: false for a language model, which has nothing that is new for the task.
        batches: opens an endless stream of training batches, the same at each call.
        calibrated: `(settings, compute) -> (bases, cost)`: reuses the basis stored for these settings, or calls
            `compute` and stores what it gives; settings None: never stored.
        accumulation: backward passes for one step of the optimizer.
    """

    lr: float
    weight_decay: float
    train_rest: bool
    is_head: Callable[[str], bool]
    batches: Callable[[], Iterator[Batch]]
    calibrated: Callable[
        [Mapping[str, Any] | None, Callable[[], dict[str, Basis]]], tuple[dict[str, Basis], dict[str, Any]]
    ]
    accumulation: int = 1
    has_head: bool = True


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to train.

    Attributes:
        optimizer: over all that trains.
        trainable: gradient entries that one step uses: all trainable parameters, of SparseGrad and MeProp weights
            the kept entries, as the paper counts them.
        trainable_per_weight: layer kind -> the same per MLP weight.
        calibration: what the calibration cost; empty without one.
        finish: turns the model into an ordinary one of the same function, in place.
    """

    optimizer: torch.optim.Optimizer
    trainable: int
    trainable_per_weight: dict[str, int]
    calibration: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], object] = lambda: None


class Method(Protocol):
    """One method; a frozen dataclass whose fields are its YAML's and are checked when it is made."""

    name: str

    def check(self, linears: Linears) -> None:
        """Raise `UserError` for settings that do not fit these linears, before anything is computed."""

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """Change `model` in place to what trains, and return its optimizer and counts."""


def freeze(model: nn.Module, linears: Linears, context: Context, *, mlp_weights: bool) -> None:
    """Set what trains: the head, the rest if asked, and the MLP weights if `mlp_weights`; it is float32 at least."""
    weights = {id(linear.weight) for linear in all_linears(linears)}
    if context.has_head and not any(context.is_head(name) for name, _ in model.named_parameters()):
        raise UserError(f"model.head matches no parameter of {type(model).__name__}: name those new for each task")
    for name, parameter in model.named_parameters():
        rest = context.train_rest or context.is_head(name)
        train_only(parameter, mlp_weights if id(parameter) in weights else rest)


def train_only(parameter: nn.Parameter, trains: bool) -> None:
    """Set whether a parameter trains. What trains is in float32: in bfloat16 most updates would round to nothing."""
    parameter.requires_grad_(trains)
    if trains and parameter.dtype in (torch.bfloat16, torch.float16):
        parameter.data = parameter.data.float()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: Iterable[nn.Parameter], context: Context) -> torch.optim.AdamW:
    """The AdamW of all methods, fused: the same and as fast as it can be for each."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=context.lr, weight_decay=context.weight_decay, fused=True)
    # Fused, it writes without counting its writes, by which `BlockLinear` would know that its core has moved.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(trained))
    return optimizer


def count_trainable(model: nn.Module, linears: Linears, per_weight: Mapping[str, int]) -> int:
    """Trainable parameters outside the MLP weights plus `per_weight` for each MLP weight."""
    weights = {id(linear.weight) for linear in all_linears(linears)}
    rest = sum(parameter.numel() for parameter in trainable_parameters(model) if id(parameter) not in weights)
    return rest + sum(per_weight[kind] * len(found) for kind, found in linears.items())


def check_kept(density: float | None, keep: int | None) -> None:
    """Exactly one of `method.density` and `method.keep`, in range; shapes are checked with the linears."""
    if (density is None) == (keep is None):
        raise UserError(f"method.density={density} and method.keep={keep}: give one and set the other to null")
    if keep is not None:
        check_integer("method.keep", keep, at_least=1)
    check_density(density)


def kept_per_weight(linears: Linears, density: float | None, keep: int | None) -> dict[str, int]:
    """Layer kind -> kept entries of each of its weights."""
    return {kind: count_kept(shape, keep=keep, density=density) for kind, shape in weight_shapes(linears).items()}
