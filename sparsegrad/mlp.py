"""Find the MLP linears of a model by layer kind, through patterns of module names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from sparsegrad.errors import UserError, check_choice

# Layer kind -> pattern that must match the whole module name. RoBERTa's encoder has BERT's names.
_BERT = {
    "intermediate": r".*encoder\.layer\.\d+\.intermediate\.dense",
    "output": r".*encoder\.layer\.\d+\.output\.dense",
}
# Gated: down(act(gate(x)) * up(x)).
_LLAMA = {kind: rf".*layers\.\d+\.mlp\.{kind}_proj" for kind in ("gate", "up", "down")}
LAYOUTS: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

Linears = dict[str, dict[str, nn.Linear]]
"""Layer kind -> module name -> linear, in the model's order."""


def find_mlp(model: nn.Module, patterns: Mapping[str, str] | str | None = None) -> Linears:
    """Find the MLP linears of `model` by kind.

    Args:
        model: any module.
        patterns: layer kind -> regular expression for the whole module name; or the name of a known layout; or None:
            the layout that `model.config.model_type` names.

    Raises:
        UserError: for an unknown layout, a bad expression, a kind without linears, or one that mixes shapes.
    """
    if patterns is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        patterns = check_choice("model_type", model_type, LAYOUTS, "for another layout give mlp={kind: pattern}")
    if isinstance(patterns, str):
        patterns = LAYOUTS[check_choice("mlp", patterns, LAYOUTS, "or give {kind: pattern}")]
    if not isinstance(patterns, Mapping) or not patterns or not all(isinstance(p, str) for p in patterns.values()):
        raise UserError(f"mlp={patterns} names no layer kind: give {{kind: pattern}}, or one of {', '.join(LAYOUTS)}")
    return {kind: _find_kind(model, kind, pattern) for kind, pattern in patterns.items()}


def _find_kind(model: nn.Module, kind: str, pattern: str) -> dict[str, nn.Linear]:
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise UserError(f"mlp.{kind}={pattern} is not a regular expression: {error}") from None
    found = {name: module for name, module in model.named_modules() if matches(name) and isinstance(module, nn.Linear)}
    if not found:
        raise UserError(
            f"{type(model).__name__} has no MLP linear of kind {kind} (pattern {pattern}): "
            "name the model's own modules in mlp={kind: pattern}"
        )
    shapes = {tuple(linear.weight.shape) for linear in found.values()}
    if len(shapes) > 1:
        raise UserError(f"mlp.{kind}={pattern} matches weights of shapes {sorted(shapes)}: name one kind per shape")
    return found
