"""The loss of a model for one batch, wherever the model's output holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError

Batch = Mapping[str, Any]
NO_REENTRANT = "checkpointing of activations needs use_reentrant=False here, because only the linears train"


def compute_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The loss of `model` for one batch, whose tensors are moved to `device`.

    Raises:
        UserError: when the batch is not a mapping with tensors, or the model gives no loss that can be differentiated.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"a calibration batch is a {type(batch).__name__}: give mappings that model(**batch) takes")
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise UserError(
            f"a calibration batch of {', '.join(map(str, batch))} holds no tensor: give tensors, as a DataLoader or "
            'a tokenizer with return_tensors="pt" makes them'
        )
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    output, labelled = model(**moved), any(name.startswith("label") for name in moved)
    loss = _find_loss(output, labelled)
    if loss is None:
        remedy = "return it as an attribute, as a key, or first in a tuple"
        if not labelled:
            remedy = 'give batches with labels, under a key that begins with "label"'
            remedy += ", or return the loss as an attribute or a key" if isinstance(output, tuple) else ""
        raise UserError(
            f"the model gives no loss for a batch of {', '.join(moved)}: {remedy}; "
            f"it returned {_describe_output(output)}"
        )
    if loss.numel() != 1 or not loss.requires_grad:
        # A reentrant checkpoint has no gradient if none of its inputs needs one, as after a frozen embedding.
        other = "the linears have to be those of this model, not of a copy"
        remedy = "" if loss.numel() != 1 else f"; {NO_REENTRANT}; {other}"
        raise UserError(
            f"the model's loss {tuple(loss.shape)} cannot be differentiated: give one number with gradients{remedy}"
        )
    return loss


def check_gradients_enabled() -> None:
    """Raise `UserError` inside `torch.no_grad()` and the like: no loss has gradients there."""
    if not torch.is_grad_enabled():
        raise UserError("gradients are switched off: call this outside torch.no_grad() and inference_mode()")


def _find_loss(output: Any, labelled: bool) -> Tensor | None:
    """The loss, where transformers' Trainer looks for it. A tuple starts with it only if the batch had labels."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):  # a named tuple may have its loss anywhere
        found = output[0] if labelled and output else None
    else:
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def _describe_output(output: Any) -> str:
    """The type of a model's result and what it contains."""
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in output) or 'nothing'}"
    return f"a {type(output).__name__}"
