"""Which blocks of a model are fine-tuned: a list of indices, or a slice (paper, section 5.2: every third)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsegrad.errors import UserError, check_choice, fail
from sparsegrad.targets import Linears, find_mlp

_SLICE = re.compile(r"(\d*):(\d*)(?::(\d*))?")
_ALLOWED = "give a list of block indices such as [0,3,6], a slice start:stop:step such as '0::3', or null for all"


def find_linears(model: nn.Module, mlp: Any) -> Linears:
    """The MLP linears of `model.mlp`; an error names that setting, not the library's argument."""
    try:
        return find_mlp(model, mlp)
    except UserError as error:
        raise UserError(str(error).replace("target_modules", "model.mlp")) from None


def check_blocks(blocks: Any) -> None:
    """Raise `UserError` unless `blocks` is null, a list of distinct indices, or a slice."""
    if blocks is None:
        return
    if isinstance(blocks, str):
        _slice(blocks)
        return
    whole = isinstance(blocks, Sequence) and all(isinstance(index, int) and index >= 0 for index in blocks)
    if not whole or not blocks or len(set(blocks)) < len(blocks):
        raise fail("model.blocks", blocks, _ALLOWED)


def block_indices(blocks: Any, depth: int) -> list[int]:
    """The chosen ones of `depth` blocks, ascending.

    Raises:
        UserError: for a block that the model does not have, or a slice that selects none.
    """
    check_blocks(blocks)
    if blocks is None:
        return list(range(depth))
    chosen = list(range(depth))[_slice(blocks)] if isinstance(blocks, str) else sorted(blocks)
    beyond = [index for index in chosen if index >= depth]
    if beyond or not chosen:
        what = f"block {beyond[0]} does not exist: the model has" if beyond else "it selects none of the model's"
        raise fail("model.blocks", blocks, f"{what} {depth} blocks, 0 to {depth - 1}", _ALLOWED)
    return chosen


def select_linears(linears: Linears, kinds: Sequence[str] | None, blocks: Any) -> Linears:
    """The MLP linears of the chosen kinds in the chosen blocks.

    A block's index is the first number in a module's name, as in `model.layers.3.mlp.up_proj`.

    Raises:
        UserError: for a kind or a block that the model does not have, or blocks of modules without an index.
    """
    if kinds is not None and (isinstance(kinds, str) or not kinds):
        raise fail("model.kinds", kinds, f"give a list of {', '.join(linears)}, or null for all")
    for kind in kinds or ():
        check_choice("model.kinds", kind, linears)
    if kinds is not None:
        linears = {kind: found for kind, found in linears.items() if kind in kinds}
    if blocks is None:
        return linears
    depth = 1 + max(_index(name, blocks) for found in linears.values() for name in found)
    chosen = set(block_indices(blocks, depth))
    return {
        kind: {name: linear for name, linear in found.items() if _index(name, blocks) in chosen}
        for kind, found in linears.items()
    }


def dense_weights(linears: Linears, kinds: Sequence[str] | None, blocks: Any, sparse: Linears) -> frozenset[str]:
    """Names of the weights that train densely beside those of `sparse`: the kinds `kinds` in the chosen blocks.

    Raises:
        UserError: for a kind that `linears` does not have, or that `sparse` has too.
    """
    if not kinds:
        return frozenset()
    for kind in kinds:
        if kind in sparse:
            raise fail("model.dense", list(kinds), f"{kind} is in model.kinds", "name each kind once")
    found = select_linears(linears, kinds, blocks)
    return frozenset(f"{name}.weight" for names in found.values() for name in names)


def _slice(text: str) -> slice:
    match = _SLICE.fullmatch(text.strip())
    numbers = [int(part) if part else None for part in match.groups()] if match else []
    if match is None or numbers[2] == 0:
        raise fail("model.blocks", text, _ALLOWED)
    return slice(*numbers)


def _index(name: str, blocks: Any) -> int:
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        remedy = "leave it out, and name the linears to train as model.mlp={kind: pattern}"
        raise fail("model.blocks", blocks, f"module {name} has no block index in its name", remedy)
    return int(found[1])
