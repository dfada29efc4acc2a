"""Checks of `SparseGradAdamW`: hyperparameters and parameter groups. Each raises `UserError`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sparsegrad.distributed import is_shard, shards_error
from sparsegrad.errors import UserError, check_choice, check_number, fail
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.selection import count_kept
from sparsegrad.targets import UPDATED, check_updated

# Options of AdamW's groups with the value that a SparseGrad group must have.
_NOT_IMPLEMENTED = {"amsgrad": False, "capturable": False, "differentiable": False, "decoupled_weight_decay": True}


def is_sparse(group: dict[str, Any]) -> bool:
    """Whether SparseGrad trains a group; plain AdamW trains the others."""
    return group.get("keep") is not None or group.get("density") is not None


def check_hyperparameters(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Check that the hyperparameters are in range."""
    check_rate("lr", lr)
    check_number("eps", eps, at_least=0)
    check_number("weight_decay", weight_decay, at_least=0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise fail("betas", betas, "Adam has two", "give a pair such as (0.9, 0.999)")
    for beta in betas:
        check_number("betas", beta, at_least=0, below=1)


def check_rate(name: str, value: Any) -> None:
    """Check a learning rate: a number or a scalar tensor; 0 is allowed, because a schedule may set it later."""
    check_number(name, value.item() if isinstance(value, Tensor) and value.dim() == 0 else value, at_least=0)


def check_implemented(group: dict[str, Any]) -> None:
    """Check that a SparseGrad group has no option of AdamW that would have no effect."""
    for name, value in _NOT_IMPLEMENTED.items():
        if group.get(name, value) != value:
            raise UserError(
                f"{name}={group[name]} has no effect on SparseGrad weights: set group[{name!r}] = {value} in the "
                "groups with keep or density"
            )


def check_step(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Check what may have changed since a group was added: options, dtypes, gradients that torch's AdamW refuses."""
    if taken := is_sparse(group):
        check_implemented(group)
    elif group.get("basis") is not None:
        raise UserError(
            "a group with a basis has neither keep nor density, and AdamW would take its rotated gradients for plain "
            "ones: set group['density'] or group['keep']"
        )
    for number, weight in enumerate(group["params"]):
        if (gradient := weight.grad) is None:
            continue
        if taken:
            _check_matrix(weight, name_of(group, number))
        if gradient.is_sparse and not taken:
            raise UserError(
                f"{name_of(group, number)} has a sparse gradient, which AdamW does not take: build its embedding with "
                "sparse=False, or freeze it with requires_grad_(False) before the optimizer is made"
            )
        moments = state.get(weight, {}).get("exp_avg")
        if weight.dtype not in UPDATED or (moments is not None and moments.dtype != weight.dtype):
            check_dtype(weight, state.get(weight, {}), name_of(group, number), taken=taken)


def name_of(group: dict[str, Any], number: int) -> str:
    """What a message calls a parameter of a group: its name, or its shape."""
    return (
        group["param_names"][number]
        if "param_names" in group
        else f"a parameter {tuple(group['params'][number].shape)}"
    )


def check_dtype(weight: Tensor, state: Mapping[str, Any], name: str, taken: bool = True) -> None:
    """Check that the moments of a weight, which may have changed its dtype since, go with it; `taken` by SparseGrad."""
    if taken:
        check_updated(weight, name)
    moments = state.get("exp_avg")
    wanted = torch.float32 if taken and weight.dtype == torch.bfloat16 else weight.dtype
    if moments is not None and moments.dtype != wanted:
        raise UserError(
            f"{name} is {weight.dtype}, but its moments from earlier steps are {moments.dtype}: convert the model "
            "before the first step, or call to_linears(model) and prepare again"
        )


def _check_matrix(weight: Tensor, name: str) -> None:
    if weight.dim() != 2:
        raise UserError(
            f"{name} cannot be SparseGrad: put only weights (out, in) into the groups with keep or density, and change "
            "these options in such groups alone"
        )


def check_group(group: dict[str, Any]) -> None:
    """Check that every weight is a matrix, fits the basis and has enough entries."""
    check_implemented(group)
    check_choice("moments", group["moments"], tuple(MOMENTS))
    for weight, name in zip(group["params"], group.get("param_names") or repeat("a weight"), strict=False):
        if is_shard(weight):
            raise shards_error(f"a parameter {tuple(weight.shape)} is")
        _check_matrix(weight, f"a parameter {tuple(weight.shape)}")
        check_updated(weight, "a SparseGrad weight")
        count_kept(weight.shape, keep=group["keep"], density=group["density"], name=name)
        basis = group["basis"]
        if basis is not None and not basis.fits(weight.shape):
            raise UserError(
                f"a basis for {basis.shape} does not fit a weight {tuple(weight.shape)}: calibrate it again"
            )
