"""How many parameters a peft method trains, and the size of it that a budget asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sparsegrad.errors import UserError, fail
from sparsegrad.methods.peft_config import make_config, quiet, wrap
from sparsegrad.targets import Linears, weight_shapes

# The field that sets the size of a type, where it is not `r`; None: the size is fixed.
_SIZE_FIELDS: dict[str, str | None] = {
    "BOFT": "boft_block_size", "OFT": "oft_block_size", "C3A": "block_size", "FOURIERFT": "n_frequency",
    "WAVEFT": "n_frequency", "OSF": "effective_rank",
    **dict.fromkeys(("IA3", "BEFT", "ROAD", "FROD", "SUPERTUNING")),
}  # fmt: skip


class Weight(NamedTuple):
    """The linears of one kind: their shape (out, in), whether they have a bias, and their number."""

    rows: int
    columns: int
    bias: bool
    number: int


Weights = Mapping[str, Weight]


def describe_weights(linears: Linears) -> dict[str, Weight]:
    """Layer kind -> what its linears are."""
    return {
        kind: Weight(*shape, all(one.bias is not None for one in linears[kind].values()), len(linears[kind]))
        for kind, shape in weight_shapes(linears).items()
    }


@dataclass(frozen=True)
class Size:
    """What a method does to one linear of each kind.

    Attributes:
        counts: layer kind -> trainable parameters.
        merges: whether its change can be merged into the weights.
    """

    counts: dict[str, int]
    merges: bool


class _StandIn(nn.Module):
    """One linear of each kind, `linears.0` and so on: peft shows on them what it would make of the model's."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(one.columns, one.rows, one.bias) for one in weights.values())


def measure_size(node: Mapping[str, Any], weights: Weights, *, merge: bool = True) -> Size:
    """Wrap one linear per kind and count what trains.

    Raises:
        UserError: if peft cannot wrap them, or nothing would train.
    """
    # An initialisation of W's shape or from data costs time and changes no count.
    plain = {"init_lora_weights": True} if isinstance(node.get("init_lora_weights"), str) else {}
    node = {name: value for name, value in {**node, **plain}.items() if not (plain and name.endswith("_ga_config"))}
    with torch.random.fork_rng(devices=[]):  # the run's own draws must not depend on this
        model = _StandIn(weights)
        shapes = {f"linears.{place}": (one.rows, one.columns) for place, one in enumerate(weights.values())}
        tuner = wrap(model, make_config(node, shapes))
        parts = dict(zip(weights, model.linears, strict=True))
        counts = {kind: sum(p.numel() for p in part.parameters() if p.requires_grad) for kind, part in parts.items()}
        if not any(counts.values()):
            raise UserError(f"method.config: {node['peft_type']} trains nothing in these linears: give other settings")
        return Size(counts, merge and _can_merge(tuner))


def _can_merge(tuner: BaseTuner) -> bool:
    try:
        with quiet():
            merged: Any = tuner.merge_and_unload()
    except Exception:  # as above: NotImplementedError, ValueError and others
        return False
    return all(type(linear) is nn.Linear for linear in merged.linears)


def size_field(kind: str) -> str | None:
    """The field of a type that sets how many parameters it trains; None if its size is fixed."""
    return _SIZE_FIELDS.get(kind, "r")


def fit_budget(node: Mapping[str, Any], weights: Weights, density: float) -> dict[str, Any]:
    """The value of the size field whose trainable count is closest to `density` of the weights.

    Args:
        node: peft's fields without the size field.
        weights: layer kind -> what its linears are.
        density: wanted share of the entries.

    Returns:
        `field`, `value`, and the `share` that came out.

    Raises:
        UserError: for a type of fixed size, or a budget that no size comes within a factor of 2 of.
    """
    kind = str(node["peft_type"]).upper()
    field = size_field(kind)
    if field is None:
        counts = measure_size(node, weights, merge=False).counts
        own = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise _refuse_budget(density, f"the size of {kind} is fixed ({own} per weight)", "set it to null")
    shares = _Shares(node, weights, field)
    _search(shares.measure, density, max(one.rows * one.columns for one in weights.values()))
    if not shares.measured:
        shares.count(4)  # raises, with peft's reason
        raise _refuse_budget(density, f"no {field} fits these linears", f"set it to null and {field} by hand")
    best = min(shares.measured, key=lambda value: (abs(shares.measured[value] - density), value))
    share = shares.measured[best]
    if not density / 2 <= share <= 2 * density:
        least = share > density
        about = f"the {'smallest' if least else 'largest'} share of {kind} is {share:.2g}, with {field}={best}"
        raise _refuse_budget(density, about, f"give at {'least' if least else 'most'} density:{share:.2g}")
    return {"field": field, "value": best, "share": round(share, 6)}


def _refuse_budget(density: float, reason: str, remedy: str) -> UserError:
    return fail("method.budget", f"density:{density:g}", reason, remedy)


class _Shares:
    """The trainable shares of one method at values of its size field; `measured` has those that peft accepts."""

    def __init__(self, node: Mapping[str, Any], weights: Weights, field: str) -> None:
        # OFT takes its rank or its block size; its default sets the second already.
        self._node = {**node, "r": 0} if str(node["peft_type"]).upper() == "OFT" else node
        self._weights, self._field = weights, field
        self._whole = sum(one.number * one.rows * one.columns for one in weights.values())
        self.measured: dict[int, float] = {}

    def count(self, value: int) -> int:
        """Trainable parameters of all linears with the field at `value`; `UserError` where peft refuses it."""
        counts = measure_size({**self._node, self._field: value}, self._weights, merge=False).counts
        return sum(self._weights[name].number * count for name, count in counts.items())

    def measure(self, value: int) -> float | None:
        """The trainable share with the field at `value`; None where peft refuses it."""
        if value not in self.measured:
            try:
                self.measured[value] = self.count(value) / self._whole
            except UserError:
                return None
        return self.measured[value]


def _search(share: Callable[[int], float | None], density: float, largest: int) -> None:
    """Call `share` at values around the one that gives `density`: powers of 2, then between the nearest two.

    Shares rise with the field (a rank) or fall (the block size of a block-diagonal matrix).
    """
    if _search_line(share, density):
        return
    low = high = 0
    below = False  # whether the share at `low` is below the density; beyond `high` it is not, or peft refuses
    for value in (2**power for power in range(largest.bit_length())):
        found = share(value)
        if low and (found is None or (found < density) is not below):
            high = value
            break
        if found is not None:
            low, below = value, found < density
    while high - low > 1:
        middle = (low + high) // 2
        found = share(middle)
        if found is None:  # block sizes must divide the widths: look at all that are left
            for value in range(low + 1, high):
                share(value)
            return
        low, high = (middle, high) if (found < density) is below else (low, middle)


def _search_line(share: Callable[[int], float | None], density: float) -> bool:
    """Call `share` where it gives `density` if it grows by the same amount with each step of the field, as of ranks."""
    first, second = share(1), share(2)
    if first is None or second is None or second <= first:
        return False
    low = max(1, int(1 + (density - first) / (second - first)))
    found = share(low)
    share(low + 1)
    return found is not None and abs(found - first - (low - 1) * (second - first)) < 1e-9
