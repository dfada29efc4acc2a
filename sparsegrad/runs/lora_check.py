"""Whether what will train can be saved as LoRA, found before the training: `save_lora` could only refuse it after."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from sparsegrad.adapter.lora import check_changes
from sparsegrad.errors import UserError, fail
from sparsegrad.methods.base import Prepared
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.parts import Parts
from sparsegrad.runs.saving import MAX_ERROR


def make_outline(model: nn.Module) -> nn.Module:
    """The modules of a model, with tied weights, but without its numbers."""
    with torch.no_grad():
        parameters = {id(one): nn.Parameter(one.to("meta"), requires_grad=False) for one in model.parameters()}
        buffers = {id(one): one.to("meta") for one in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers})


def check_outline(
    config: RunConfig,
    parts: Parts,
    prepared: Prepared,
    outline: nn.Module,
    before: Iterable[tuple[str, nn.Parameter]],
) -> None:
    """Check `save_adapter=lora`.

    Args:
        config: the run.
        parts: with the model that is prepared.
        prepared: what the method made of it.
        outline: of the model as it was loaded.
        before: the parameters that it had, by all their names; those that train are marked by now.

    Raises:
        UserError: if `save_lora` would refuse what trains.
    """
    kinds = [kind for kind, count in prepared.trainable_per_weight.items() if count]
    targets = {f"{name}.weight" for kind in kinds for name in parts.linears[kind]}
    changed = {name for name, parameter in before if parameter.requires_grad} | targets
    has_head = not config.task.is_language and not config.model.keep_head
    new = {name for name in changed if has_head and config.model.is_head(name)}
    exact = targets if getattr(config.method, "holds_factors", False) else set()
    blocks = {name.removesuffix(".weight") for name in exact}
    max_error = MAX_ERROR if config.adapter_rank is None and not exact else None
    try:
        check_changes(outline, changed, new, blocks, config.adapter_rank, max_error)
    except UserError as error:
        what = str(error).replace("sparsegrad.save_adapter", "save_adapter=sparsegrad")  # the remedy, as a run has it
        raise fail("save_adapter", "lora", what) from None
