"""Calls of the public functions: an unknown name or a wrong order of arguments is answered by one clear error."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sparsegrad.errors import Function, UserError, did_you_mean

# A word of peft, transformers or torch -> the arguments that mean the same; the first that a function has is named.
_SYNONYMS = {
    "learning_rate": ("lr",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
    "data": ("batches",),
    "dataset": ("batches",),
    "dataloader": ("batches",),
    "train_dataset": ("batches",),
    "train_dataloader": ("batches",),
    "calibration_steps": ("steps",),
    "target_modules": ("mlp",),
    "layers_to_transform": ("target_modules",),
    "r": ("rank",),
    "base_model": ("base",),
    "name": ("adapter_name", "repo_id"),
    "path": ("folder",),
    "output_dir": ("folder",),
    "save_directory": ("folder",),
    "repo": ("repo_id",),
}
_SHORT = 60  # characters of a value in a message
# Name of an argument -> the classes it may have, in words too. Where its annotation is Any, the function checks it.
_CLASSES: dict[str, tuple[Any, str]] = {
    "model": (nn.Module, "a torch.nn.Module"),
    "folder": ((str, os.PathLike), "a path"),
    "path": ((str, os.PathLike), "a path"),
    "base": ((nn.Module, Mapping, str, os.PathLike, type(None)), "a model, its folder or hub id, or tensors by name"),
}


def explained(notes: Mapping[str, str] | None = None, more: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Let a function answer wrong arguments by a `UserError` that names the right ones, instead of Python's error.

    Args:
        notes: a word of another library that no argument means -> what to do instead.
        more: names that the function takes beside those of its signature, in its `**` argument.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        order = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        required = [name for name in order if parameters[name].default is inspect.Parameter.empty]
        known = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD] + list(more)
        checked = {name: _CLASSES[name] for name in known if name in _CLASSES and parameters[name].annotation != "Any"}
        form = f"{function.__name__}({', '.join(order)}{', ...' if len(order) < len(parameters) else ''})"

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    raise _unknown(function.__name__, name, known, notes or {})
            for name, value in {**dict(zip(order, args, strict=False)), **given}.items():
                if name in checked and not isinstance(value, checked[name][0]):
                    raise UserError(f"{name} is {show(value)}, not {checked[name][1]}: call {form}")
            if missing := [name for name in required[len(args) :] if name not in given]:
                raise UserError(f"{function.__name__} needs {', '.join(missing)}: call {form}")
            return function(*args, **given)

        return call  # type: ignore[return-value]

    return decorate


def show(value: object) -> str:
    """A value in a message: a text, a number, None or a short list as it is written, anything else by its class."""
    short = isinstance(value, str | bool | int | float | list | None) and len(repr(value)) <= _SHORT
    return repr(value) if short else f"a {type(value).__name__}"


def _unknown(function: str, name: str, known: Sequence[str], notes: Mapping[str, str]) -> UserError:
    meant = next((one for one in _SYNONYMS.get(name, ()) if one in known), None)
    hint = f"did you mean {meant}?" if meant else notes.get(name) or did_you_mean(name, known)
    return UserError(f"{function} has no argument {name}: {hint or 'choose from ' + ', '.join(known)}")
