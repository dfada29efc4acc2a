"""The check that a detected layout has its linears in every block of the model, not in a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from sparsegrad.errors import UserError
from sparsegrad.targets_errors import describe_linears


def refuse_partial(
    model: nn.Module, layout: str, patterns: Mapping[str, str], found: Mapping[str, Sequence[str]]
) -> None:
    """Raise `UserError` if some blocks lack linears of the layout: their MLPs would train densely, unnoticed.

    Args:
        model: the model whose layout was detected.
        layout: its name.
        patterns: layer kind -> pattern of the layout.
        found: layer kind -> names of the linears that the pattern matches.
    """
    by_kind = [{_find_block(name, patterns[kind]) for name in names} for kind, names in found.items()]
    complete = set.intersection(*by_kind)
    for stack in sorted({stack for stack, _ in set.union(*by_kind)}):
        blocks = model.get_submodule(stack)
        if isinstance(blocks, nn.ModuleList):  # a Sequential may also hold an embedding and a head
            # A block without parameters, such as one that was pruned, has nothing to train.
            numbers = [
                number for number, block in blocks.named_children() if next(block.parameters(), None) is not None
            ]
            matching = sum((stack, number) in complete for number in numbers)
            if matching < len(numbers):
                raise _explain(model, layout, f"{matching} of {len(numbers)} blocks of {stack or 'the model'}")


def _find_block(name: str, pattern: str) -> tuple[str, str]:
    """Name of the list of blocks in which a linear is, and the number of its block: the first in the pattern."""
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    position = numbers[-pattern.count(r"\d+")]
    return ".".join(parts[:position]), parts[position]


def _explain(model: nn.Module, layout: str, where: str) -> UserError:
    return UserError(
        f"{type(model).__name__} has the MLP names of the layout {layout} in {where}, and the other MLPs would train "
        f'densely: name the linears to train with target_modules=[...], or give target_modules="{layout}" to train '
        f"those of the layout alone; {describe_linears(model)}"
    )
