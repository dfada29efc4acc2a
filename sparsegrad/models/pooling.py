"""What a classifier's head sees of its tokens: the first one, or the mean of all that are not padding.

Encoders that were trained with mean pooling (MiniLM, MPNet of sentence-transformers) have nothing to say in their first
token. The models' heads read position 0, so the mean is put there; the models themselves stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import fail

# Modules that read position 0 of the encoder's output, by layout: BERT's pooler, and the heads of the others.
_READERS = ("bert.pooler", "electra.pooler", "deberta.pooler", "classifier", "pooler")


def set_pooling(model: nn.Module, pooling: str | None) -> None:
    """Let the head of a classifier see the pooled tokens that `model.pooling` asks for.

    Args:
        model: a classifier of `transformers`; hooks are added to it, no module changes.
        pooling: `mean`; `cls` and None leave it as it is.

    Raises:
        UserError: for a layout whose head does not read the first token from a module of its own.
    """
    if pooling != "mean":
        return
    reader = _find_reader(model)
    passed: list[Tensor | None] = []  # the attention mask of the forward pass at work

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed[:] = [kwargs.get("attention_mask", args[1] if len(args) > 1 else None)]

    def pool(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = passed.pop() if passed else None
        return (mean_of_tokens(args[0], mask)[:, None], *args[1:])  # (rows, 1, width)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    reader.register_forward_pre_hook(pool)


def mean_of_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (rows, length, width) over the length, leaving out where `mask` (rows, length) is 0: (rows, width)."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(states.dtype)[..., None]  # (rows, length, 1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def _find_reader(model: nn.Module) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name in _READERS:
        # A classifier that is a plain linear gets pooled features, not the sequence.
        if name in modules and not isinstance(modules[name], nn.Linear | torch.nn.Identity):
            return modules[name]
    raise fail("model.pooling", "mean", f"{type(model).__name__} has no module that reads its first token", "use null")
