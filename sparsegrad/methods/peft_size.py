"""How many parameters a peft method trains, and the size of it that a budget asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sparsegrad.errors import UserError, fail
from sparsegrad.methods.peft_config import make_config, quiet, wrap
from sparsegrad.methods.peft_search import search_divisors, search_sizes
from sparsegrad.targets import Linears, weight_shapes

# The field that sets the size of a type, where it is not `r`; None: no budget chooses the size.
_SIZE_FIELDS: dict[str, str | None] = {
    "BOFT": "boft_block_size", "OFT": "oft_block_size", "C3A": "block_size", "FOURIERFT": "n_frequency",
    "WAVEFT": "n_frequency", "OSF": "effective_rank", "SUPERTUNING": "sparsity",
    **dict.fromkeys(("IA3", "BEFT", "ROAD", "FROD")),
}  # fmt: skip
# What sets the size of a type that no budget chooses, where it is not fixed.
_BY_HAND = {"FROD": "sparse_rate", "ROAD": "variant"}
# Fields that set the sizes of single linears, by their names.
SIZE_PATTERNS = ("rank_pattern", "n_frequency_pattern", "block_size_pattern")
# Fields by which linears of one kind can have different sizes: all have to be counted.
_APART = (*SIZE_PATTERNS, "feedforward_modules", "use_bdlora", "proportional_parameters")


class Weight(NamedTuple):
    """The linears of one kind: their shape (out, in), whether they have a bias, their number and their names."""

    rows: int
    columns: int
    bias: bool
    number: int
    names: tuple[str, ...] = ()


Weights = Mapping[str, Weight]


def describe_weights(linears: Linears) -> dict[str, Weight]:
    """Layer kind -> what its linears are."""
    shapes, described = weight_shapes(linears), {}
    for kind, found in linears.items():
        bias = all(one.bias is not None for one in found.values())
        described[kind] = Weight(*shapes[kind], bias, len(found), tuple(found))
    return described


@dataclass(frozen=True)
class Size:
    """What a method does to the linears.

    Attributes:
        counts: layer kind -> trainable parameters of all its linears.
        merges: whether its change can be merged into the weights.
    """

    counts: dict[str, int]
    merges: bool


def measure_size(node: Mapping[str, Any], weights: Weights, *, merge: bool = True) -> Size:
    """Wrap linears like the model's, one per kind or all where they may differ, and count what trains.

    Raises:
        UserError: if peft cannot wrap them, or nothing would train.
    """
    # An initialisation of W's shape or from data costs time and changes no count.
    plain = {"init_lora_weights": True} if isinstance(node.get("init_lora_weights"), str) else {}
    node = {name: value for name, value in {**node, **plain}.items() if not (plain and name.endswith("_ga_config"))}
    chosen = _choose_names(node, weights)
    shapes = {name: weights[kind][:2] for kind, names in chosen.items() for name in names}
    # The run's own draws must not depend on this, nor the merge on an autocast under which the run prepares its method.
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        model = _make_stand_in(weights, chosen)
        tuner = wrap(model, make_config(node, shapes))
        counts = {kind: _count(model, names) * weights[kind].number // len(names) for kind, names in chosen.items()}
        if not any(counts.values()):
            raise UserError(f"method.config: {node['peft_type']} trains nothing in these linears: give other settings")
        return Size(counts, merge and _can_merge(tuner, list(shapes)))


def _choose_names(node: Mapping[str, Any], weights: Weights) -> dict[str, tuple[str, ...]]:
    """Layer kind -> names of the linears to count: peft looks at names, so that they must be the model's."""
    names = {kind: one.names or (f"linears.{place}",) for place, (kind, one) in enumerate(weights.items())}
    return names if any(node.get(field) for field in _APART) else {kind: found[:1] for kind, found in names.items()}


def _make_stand_in(weights: Weights, chosen: Mapping[str, tuple[str, ...]]) -> nn.Module:
    """Linears of these names and nothing else: peft shows on them what it would make of the model's."""
    model = nn.Module()
    for kind, names in chosen.items():
        for name in names:
            *path, last = name.split(".")
            parent = model
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(weights[kind].columns, weights[kind].rows, weights[kind].bias))
    return model


def _count(model: nn.Module, names: tuple[str, ...]) -> int:
    found = (parameter for name in names for parameter in model.get_submodule(name).parameters())
    return sum(parameter.numel() for parameter in found if parameter.requires_grad)


def _can_merge(tuner: BaseTuner, names: list[str]) -> bool:
    try:
        with quiet():
            merged: Any = tuner.merge_and_unload()
    except Exception:  # peft raises NotImplementedError, ValueError and others
        return False
    return all(type(merged.get_submodule(name)) is nn.Linear for name in names)


def size_field(kind: str) -> str | None:
    """The field of a type that a budget sets; None if it sets none."""
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
        UserError: for a type whose size no budget sets, or a budget that no size comes within a factor of 2 of.
    """
    kind = str(node["peft_type"]).upper()
    field = size_field(kind)
    if field is None:
        raise _refuse_type(node, weights, density)
    shares = _Shares(node, weights, field)
    shares.search(density)
    if not shares.measured:
        raise shares.refusal or _refuse_budget(density, f"no {field} fits these linears", "choose another peft_type")
    best = min(shares.measured, key=lambda value: (abs(shares.measured[value] - density), value))
    share = shares.measured[best]
    if not density / 2 <= share <= 2 * density:
        least = share > density
        about = f"the {'smallest' if least else 'largest'} share of {kind} is {share:.2g}, with {field}={best}"
        raise _refuse_budget(density, about, f"give at {'least' if least else 'most'} density:{share:.2g}")
    return {"field": field, "value": best, "share": round(share, 6)}


def _refuse_type(node: Mapping[str, Any], weights: Weights, density: float) -> UserError:
    """The error for a type whose size no budget sets; it says what the size is, and what sets it."""
    kind = str(node["peft_type"]).upper()
    counts = measure_size(node, weights, merge=False).counts
    own = ", ".join(f"{name} {count // weights[name].number}" for name, count in counts.items())
    field = _BY_HAND.get(kind)
    about = f"the size of {kind} is {f'set by method.config.{field}' if field else 'fixed'} ({own} per weight)"
    return _refuse_budget(density, about, "set it to null" + (f" and method.config.{field} by hand" if field else ""))


def _refuse_budget(density: float, reason: str, remedy: str) -> UserError:
    return fail("method.budget", f"density:{density:g}", reason, remedy)


class _Shares:
    """The trainable shares of one method at values of its size field.

    Attributes:
        measured: value -> share, of the values that peft accepts.
        refusal: why peft refused the first of the others.
    """

    def __init__(self, node: Mapping[str, Any], weights: Weights, field: str) -> None:
        self._kind = str(node["peft_type"]).upper()
        # OFT takes its rank or its block size; its default sets the second already.
        self._node = {**node, "r": 0} if self._kind == "OFT" else node
        self._weights, self._field = weights, field
        self._whole = sum(one.number * one.rows * one.columns for one in weights.values())
        self.measured: dict[float, float] = {}
        self.refusal: UserError | None = None

    def measure(self, value: float) -> float | None:
        """The trainable share with the field at `value`; None where peft refuses it."""
        if value not in self.measured:
            try:
                counts = measure_size({**self._node, self._field: value}, self._weights, merge=False).counts
            except UserError as error:
                self.refusal = self.refusal or error
                return None
            self.measured[value] = sum(counts.values()) / self._whole
        return self.measured[value]

    def search(self, density: float) -> None:
        """Measure values whose shares are around `density`."""
        entries = [one.rows * one.columns for one in self._weights.values()]
        if self._field == "sparsity":  # at least one entry of the smallest weight
            self.measure(round(1 - max(density, 1.01 / min(entries)), 9))
        elif self._field.endswith("block_size"):
            # An orthogonal factor of blocks of one entry is constant: nothing would train.
            smallest = 1 if self._kind == "C3A" else 2
            search_divisors(self.measure, [one.columns for one in self._weights.values()], smallest)
        else:
            step = self._step()
            ranks = [min(one.rows, one.columns) for one in self._weights.values()]
            largest = max(entries if self._field == "n_frequency" else ranks)
            search_sizes(lambda place: self.measure(place * step), density, max(1, largest // step))

    def _step(self) -> int:
        """What a rank has to be a multiple of."""
        if self._kind == "GRALORA":
            blocks = self._node.get("gralora_k", 2)
            return blocks if isinstance(blocks, int) and blocks > 0 else 1
        # In pairs of columns; with odd ranks HRA would start at another function, and LoRA not at all.
        pairs = self._kind == "HRA" or self._node.get("init_lora_weights") == "orthogonal"
        return 2 if pairs else 1
