"""The head of a classifier whose source has one of its own: drawn anew, or kept with its rows in the task's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError
from sparsegrad.models.config import ModelConfig
from sparsegrad.tasks.base import Task


@torch.no_grad()
def draw_head(model: Any, names: Sequence[str]) -> None:
    """Draw the modules that own the parameters `names` anew, as `transformers` does for a head that is missing."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(owner)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
        module._is_hf_initialized = False
        model._init_weights(module)


@torch.no_grad()
def keep_head(model: Any, config: ModelConfig, task: Task, heads: dict[str, Any]) -> None:
    """Put the rows of the source's head into the order of the task's labels.

    Raises:
        UserError: for a source without a head of these labels.
    """
    found = [str(label) for _, label in sorted(model.config.id2label.items())]  # the file may have any order
    order = _order(found, task)
    if order is None:
        wanted = ", ".join(task.labels) or "one number"
        raise UserError(
            f"model.keep_head=true needs a head with the labels of {task.name} ({wanted}), and {config.source} has "
            f"{', '.join(found)}: set model.keep_head=false for a new head, or name the labels in the source's "
            "config.json (id2label)"
        )
    for name, parameter in model.named_parameters():
        if config.is_head(name) and parameter.shape[0] == len(order):
            _check_last(model, name)
            parameter.copy_(parameter[order])
    for name, value in heads.items():
        setattr(model.config, name, value)


def _order(found: Sequence[str], task: Task) -> list[int] | None:
    """The position among the source's labels of each of the task's; None where they are others."""
    if not task.labels:
        return [0] if len(found) == 1 else None
    positions = {label.lower(): index for index, label in enumerate(found)}
    wanted = [label.lower() for label in task.labels]
    return [positions[label] for label in wanted] if sorted(positions) == sorted(wanted) else None


def _check_last(model: nn.Module, name: str) -> None:
    """A parameter with as many rows as labels belongs to the last linear of the head."""
    owner = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(owner, nn.Linear)
