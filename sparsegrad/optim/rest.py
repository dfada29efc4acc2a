"""Everything beside the target weights: what of it trains, at which rate, and with which weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError, check_choice, did_you_mean, fail
from sparsegrad.optim.group_checks import check_rate
from sparsegrad.targets import Linears, all_linears


def check_rest(train_rest: Any, modules_to_save: Any, rest_lr: Any, decay_vectors: Any) -> None:
    """Check the arguments of `prepare` on the rest, as far as they need no model."""
    check_choice("train_rest", train_rest, (True, False))
    check_choice("decay_vectors", decay_vectors, (True, False))
    if rest_lr is not None:
        check_rate("rest_lr", rest_lr)
    if train_rest:
        if modules_to_save is not None:
            raise UserError(
                f"modules_to_save={modules_to_save} belongs to train_rest=False: with train_rest=True every parameter "
                "that requires a gradient trains; leave it out"
            )
    elif modules_to_save is None:
        raise UserError(
            "train_rest=False freezes everything beside the target weights, a new head included: name the modules that "
            'train nevertheless, such as modules_to_save=["classifier"], or give modules_to_save=[] if there are none'
        )
    elif rest_lr is not None and not modules_to_save:
        raise UserError(
            f"rest_lr={rest_lr} has no effect with train_rest=False and modules_to_save=[]: nothing outside the target "
            "weights trains; leave it out"
        )
    elif isinstance(modules_to_save, str) or not isinstance(modules_to_save, Iterable):
        raise fail("modules_to_save", modules_to_save, 'give a list of module names, such as ["classifier"]')


def find_saved(model: nn.Module, names: Sequence[str]) -> set[int]:
    """The parameters of the modules with these names or ends of names, by identity.

    Raises:
        UserError: for a name that no module with parameters has.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    saved: set[int] = set()
    for wanted in names:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{wanted}")]
        if not found:
            parent = wanted.rpartition(".")[0]
            if parent and any(f".{name}".endswith(f".{parent}") for name in modules):
                raise fail("modules_to_save", wanted, "modules train whole, not single parameters", f"give {parent!r}")
            hint = did_you_mean(wanted, [*modules, *(name.rpartition(".")[2] for name in modules)])
            children = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"modules_to_save={wanted} is no module with parameters of {type(model).__name__}: "
                f"{hint or f'give names or ends of names; its parts are {children}'}"
            )
        saved |= {id(parameter) for module in found for parameter in module.parameters()}
    return saved


def outside(model: nn.Module, linears: Linears) -> set[int]:
    """The parameters outside the target weights, by identity; what a method adds for them is not among them."""
    weights = {id(linear.weight) for linear in all_linears(linears)}
    return {id(parameter) for parameter in model.parameters() if id(parameter) not in weights}


def freeze_rest(model: nn.Module, rest: set[int], saved: set[int]) -> None:
    """Freeze the parameters of `rest`, except for those in `saved`, which train."""
    for parameter in model.parameters():
        if id(parameter) in rest:
            parameter.requires_grad_(id(parameter) in saved)


def refuse_freezing(model: nn.Module, rest: set[int], saved: set[int]) -> None:
    """Raise `UserError` if `freeze_rest` would change what trains, which DDP notes when it wraps a model."""
    if any(p.requires_grad is not (id(p) in saved) for p in model.parameters() if id(p) in rest):
        raise UserError(
            "train_rest=False changes which parameters train, and DistributedDataParallel noted them when it wrapped "
            "the model: prepare the model first and wrap it afterwards"
        )


def set_rest_rate(optimizer: torch.optim.Optimizer, rest: set[int], lr: Any) -> None:
    """Give the parameters of `rest` a learning rate of their own; groups that hold others too are split.

    Call it before the first step and before a schedule is made.
    """
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in rest]
        if not mine:
            continue
        if len(mine) == len(group["params"]):
            group["lr"] = lr
            continue
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names", "lr")}
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            group["param_names"] = [names[id(parameter)] for parameter in group["params"] if id(parameter) not in rest]
            settings["param_names"] = [names[id(parameter)] for parameter in mine]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in rest]
        optimizer.add_param_group({**settings, "params": mine, "lr": lr})


def rest_groups(rest: list[tuple[str, nn.Parameter]], decay_vectors: bool) -> list[dict[str, Any]]:
    """Groups of plain AdamW for named parameters; without `decay_vectors` those of vectors have no weight decay."""
    if decay_vectors:
        return [{"params": rest}] if rest else []
    matrices = [(name, parameter) for name, parameter in rest if parameter.dim() > 1]
    vectors = [(name, parameter) for name, parameter in rest if parameter.dim() <= 1]
    return [group for group in ({"params": matrices}, {"params": vectors, "weight_decay": 0.0}) if group["params"]]
