"""Errors for a `target_modules` that finds nothing: the closest names of the model, in the form that was given."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from sparsegrad.errors import UserError, closest, did_you_mean

_EXAMPLE = '["intermediate.dense", "output.dense"]'
_MOST = 8  # names in one message


def is_linear(module: nn.Module) -> bool:
    """Whether SparseGrad can train a module: a linear, or GPT-2's `Conv1D`."""
    # By its name, so that the library does not depend on transformers.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def describe_linears(model: nn.Module) -> str:
    """The last parts of the names of the model's linears, as half a sentence."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in _list_linears(model)))
    if not ends:
        return "the model has no linear"
    return f"the names of its linears end in {', '.join(ends[:_MOST])}" + (" ..." if len(ends) > _MOST else "")


def explain_missing(model: nn.Module, kind: str, names: Mapping[str, str] | Sequence[str] | str | None) -> UserError:
    """The error for a kind without linears.

    Args:
        model: the model that has none of that kind.
        kind: the layer kind; for a list, the name that no module has.
        names: `target_modules` as the user gave it.
    """
    model_name = type(model).__name__
    if isinstance(names, str):
        return UserError(
            f"{model_name} has no linear of kind {kind}, which the layout {names} has: leave target_modules out to "
            f"detect the layout, or name the linears as target_modules=[...]; {describe_linears(model)}"
        )
    if isinstance(names, Mapping):
        # Without the characters of expressions, a misspelt pattern resembles the name that was meant.
        similar = _find_similar(model, names[kind].replace(r"\d+", "").translate(str.maketrans("", "", r"\^$*+?()|")))
        example = next((name for name in _list_linears(model) if similar and name.endswith(similar)), None)
        hint = f"such as {example}" if example else describe_linears(model)
        return UserError(
            f"{model_name} has no linear of kind {kind}, target_modules={json.dumps(dict(names))}: a pattern has to "
            f"match the whole name of a module, {hint}"
        )
    assert names is not None  # a detected layout has every kind
    similar = _find_similar(model, kind)
    corrected = json.dumps([similar if name == kind else name for name in names])
    hint = f"did you mean target_modules={corrected}?" if similar else describe_linears(model)
    return UserError(f"{model_name} has no module named {kind}: {hint}")


def explain_unknown_layout(model: nn.Module, name: str, layouts: Collection[str]) -> UserError:
    """The error for a `target_modules` that is a string and not one of `layouts`."""
    if name == "all-linear":
        return UserError(
            "target_modules=all-linear exists in peft only: leave target_modules out to train the linears of the MLPs, "
            f"as the paper does, or name others in a list; {describe_linears(model)}"
        )
    known = ", ".join(layouts)
    if re.search(r"[*+?|(\[^$\\]", name):  # peft reads a string as an expression
        return UserError(
            f"target_modules={name} is not a layout ({known}): an expression is given with a name for what it matches, "
            f"as target_modules={json.dumps({'mlp': name})}"
        )
    similar = name if any(_ends_in(one, name) for one in _list_linears(model)) else _find_similar(model, name)
    if similar and closest(name, layouts) is None:
        return UserError(
            f"target_modules={name} is not a layout ({known}): modules are named in a list, as "
            f"target_modules={json.dumps([similar])}"
        )
    hint = did_you_mean(name, layouts) or f"or name modules in a list, as target_modules={_EXAMPLE}"
    return UserError(f"target_modules={name} is not allowed: choose one of {known}; {hint}")


def _list_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and is_linear(module)]


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _find_similar(model: nn.Module, wanted: str) -> str | None:
    """The end of a linear's name that `wanted` is probably a misspelling of: of as many parts, else of any number."""
    split = [name.split(".") for name in _list_linears(model)]
    ends = dict.fromkeys(".".join(parts[start:]) for parts in split for start in range(len(parts)))
    if not _has_number(wanted):  # a name with the number of a block would train that block alone
        ends = {end: None for end in ends if not _has_number(end)}
    length = wanted.strip(".").count(".")
    return closest(wanted, [end for end in ends if end.count(".") == length]) or closest(wanted, ends)


def _has_number(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
