"""What calibration is given: the checks of its arguments, each answered by the call that works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.arguments import show
from sparsegrad.errors import UserError, first_line


def read_linears(mlp: Any) -> dict[str, list[nn.Linear]]:
    """Layer kind -> linears, from the result of `find_mlp` (kind -> name -> linear) or kind -> iterable of linears.

    Raises:
        UserError: for anything else, such as names, or for no linears.
    """
    if not isinstance(mlp, Mapping | nn.ModuleDict) or not mlp:
        raise _refuse_linears("mlp", mlp, mlp)
    found: dict[str, list[nn.Linear]] = {}
    for kind, given in mlp.items():
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise _refuse_linears(f"mlp[{kind!r}]", given, mlp)
        found[kind] = list(given.values() if isinstance(given, Mapping) else given)
        if not found[kind]:
            raise _refuse_linears(f"mlp[{kind!r}]", found[kind], mlp)
        for one in found[kind]:
            if not (isinstance(one, nn.Module) and isinstance(getattr(one, "weight", None), Tensor)):
                raise _refuse_linears(f"an item of mlp[{kind!r}]", one, mlp)
    return found


def _refuse_linears(what: str, value: Any, mlp: Any) -> UserError:
    """The error for an `mlp` of which `what` is `value`; names and patterns go to `find_mlp`."""
    parts = list(mlp.values()) if isinstance(mlp, Mapping) else [mlp] if isinstance(mlp, str) else mlp
    names = isinstance(parts, list | tuple) and parts and all(isinstance(part, str) for part in parts)
    call = f"find_mlp(model, {mlp!r})" if names else "find_mlp(model)"
    given = "empty" if isinstance(value, Mapping | list) and not value else show(value)
    return UserError(
        f"{what} is {given}: give linears by layer kind, as calibrate(model, batches, {call}) does, or "
        "{kind: [linear, ...]}"
    )


def check_batches(batches: Any, name: str) -> None:
    """Raise `UserError` for what is not several batches; the argument `name` sets how many are used."""
    refuse_one_batch(batches)
    # Not `iter(batches)`: that of a DataLoader starts its workers. A dataset may have `__getitem__` alone.
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise UserError(
            f"batches is {show(batches)}: give a list of batches or a DataLoader, and their number as {name}="
        )


def refuse_one_batch(batches: Any) -> None:
    """Raise `UserError` for one batch in place of several."""
    if isinstance(batches, Mapping):
        raise UserError("batches is one batch: give several, as a list of batches or a DataLoader")


def check_device(device: torch.device | str | None) -> None:
    """Raise `UserError` for a `gram_device` that does not exist."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown name, missing backend, wrong type
        raise UserError(
            f"gram_device={device} cannot be used ({first_line(error)}): give cpu, or None for that of the weights"
        ) from None
