"""Adapters: what fine-tuning changed, in a folder of its own, to be merged into the base model and taken out again.

A changed tensor is stored in the smallest of these forms:
    whole    its new values;
    sparse   flat positions and new values of the entries that differ;
    rotated  only with a tolerance: kept entries of V^T (W' - W) U, and the columns of U and V that they need.

`whole` and `sparse` hold values, not differences: W + (W' - W) is in floating point not W'. So a loaded adapter gives
the trained model bit for bit, and `unmerge` the base.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.adapter.format import Entry, digest, read_adapter
from sparsegrad.errors import UserError, warn_renamed

# Which adapter is merged into a model; a model that is gone takes its entry along.
_MERGED: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
# Numbers whose bits are added up at a time: they stay in a CPU's cache, and a GPU needs no copy of the tensor.
_TOGETHER = 2**16
_ODD = 0x9E3779B97F4A7C15  # of 64 bits; any would do

Mark = tuple[torch.dtype, torch.Size, int]
"""Dtype, shape and weighted sum of the bits of a tensor: another mark means that somebody changed it."""


@dataclass
class Patch:
    """New values of one tensor of the model: of all of it, or at flat positions `index`.

    Attributes:
        values: what the model shall have, or, while merged, what it had.
        index: flat positions of `values`; None for all.
        now: mark of the model's tensor as this adapter last left it.
        other: its mark once `values` are in it; None until the first merge.
    """

    values: Tensor
    index: Tensor | None
    now: Mark
    other: Mark | None = None

    @torch.no_grad()
    def swap(self, target: Tensor) -> None:
        """Exchange the values with those of `target`, bit for bit; each stays on its own device.

        All that needs memory comes before the first write, so that an error leaves both as they were.
        """
        flat = target.detach().view(-1)
        index = slice(None) if self.index is None else self.index.to(flat.device)
        old = flat[index].to(self.values.device, copy=True)
        # A slice copies from any device by itself; positions want the values on theirs.
        flat[index] = self.values if self.index is None else self.values.to(flat.device)
        self.values = old


class Adapter:
    """A checked adapter of one model in memory; `load_adapter` makes it. The model is unchanged until `merge`.

    Attributes:
        folder: where it was read from.
        facts: the JSON that describes it.
    """

    def __init__(self, model: nn.Module, folder: Path, facts: dict[str, Any], patches: dict[str, Patch]) -> None:
        self.folder, self.facts = folder, facts
        self._model, self._patches = weakref.ref(model), patches

    def __repr__(self) -> str:
        state = "merged" if self.merged else "not merged"
        return f"Adapter({str(self.folder)!r}, base={self.facts.get('base')!r}, {len(self._patches)} tensors, {state})"

    @property
    def merged(self) -> bool:
        """Whether the model now has this adapter's weights."""
        model = self._model()
        return model is not None and _MERGED.get(model) is self

    def merge(self) -> None:
        """Give the model the trained weights, in place.

        Where it fails halfway, as for want of memory, what was exchanged is first exchanged back.

        Raises:
            UserError: when this or another adapter is merged already, or the weights that the adapter changes are
                others than when it was loaded or unmerged.
        """
        model = self._living()
        if model in _MERGED:
            which = "this adapter" if self.merged else f"the adapter of {_MERGED[model].folder}"
            raise UserError(
                f"{which} is merged already: unmerge it first, or call sparsegrad.set_adapter(model, adapter)"
            )
        self._swap(self._untouched(model, "load the base and the adapter again"))
        _MERGED[model] = self

    def unmerge(self) -> None:
        """Give the model its base weights back, bit for bit.

        Where it fails halfway, the model stays merged.

        Raises:
            UserError: when it is not merged, or the merged weights have been trained meanwhile.
        """
        model = self._living()
        if not self.merged:
            raise UserError(f"the adapter of {self.folder} is not merged: there is nothing to unmerge")
        remedy = "save what you trained as an adapter of its own, and load the base again"
        self._swap(self._untouched(model, remedy))
        del _MERGED[model]

    def _swap(self, targets: dict[str, Tensor]) -> None:
        """Exchange all values, or on any error none."""
        done: list[str] = []
        try:
            for name, patch in self._patches.items():
                patch.swap(targets[name])
                done.append(name)
            marks = {name: patch.other or mark(targets[name]) for name, patch in self._patches.items()}
        except BaseException:
            for name in done:
                self._patches[name].swap(targets[name])
            raise
        for name, patch in self._patches.items():
            patch.now, patch.other = marks[name], patch.now

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise UserError("the model of this adapter is gone: load both again")
        return model

    def _untouched(self, model: nn.Module, remedy: str) -> dict[str, Tensor]:
        """The model's tensors of today by name, as `model.to(device)` may have put others in the place of those loaded.

        By their bits: torch counts in-place writes (`_version`), but not those of its fused optimizers.
        """
        tensors = named_tensors(model)
        for name, patch in self._patches.items():
            if name not in tensors or mark(tensors[name]) != patch.now:
                raise UserError(f"{name} was changed since this adapter was loaded, merged or unmerged: {remedy}")
            _check_contiguous(name, tensors[name])
        return {name: tensors[name] for name in self._patches}


def load_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """Read and check the adapter in `folder`; the model stays as it is until `Adapter.merge`.

    Several adapters of one base may be loaded; `set_adapter` changes between them. Load them before any is merged. Each
    holds its values in memory; form `rotated` as large as the weights themselves.

    Args:
        model: the base model: the same weights that the adapter was saved against.
        folder: what `save_adapter` wrote.

    Raises:
        UserError: for a folder that is missing, damaged or of another version; a model with other names, shapes,
            dtypes or base weights (by their sha256); values that are not finite; or when an adapter is merged.
    """
    if model in _MERGED:
        raise UserError(f"the adapter of {_MERGED[model].folder} is merged: unmerge it before another is loaded")
    facts, entries, bases = read_adapter(Path(folder))
    targets = named_tensors(model)
    patches = {name: _patch(name, entry, targets, bases) for name, entry in entries.items()}
    return Adapter(model, Path(folder), facts, patches)


def set_adapter(model: nn.Module, adapter: Adapter | None) -> None:
    """Make `adapter` the one that is merged into `model`; None: the base alone, as when `adapter` cannot be merged.

    Raises:
        UserError: see `Adapter.merge` and `Adapter.unmerge`.
    """
    merged = _MERGED.get(model)
    if merged is adapter:
        return
    if merged is not None:
        merged.unmerge()
    if adapter is not None:
        adapter.merge()


def switch(model: nn.Module, adapter: Adapter | None) -> None:
    """The earlier name of `set_adapter`."""
    warn_renamed("sparsegrad.switch", "sparsegrad.set_adapter")
    set_adapter(model, adapter)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once; tied ones under their first name."""
    saved = set(model.state_dict())
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def mark(tensor: Tensor) -> Mark:
    """The mark of a tensor, the same on every device; it costs about as much as reading the tensor once.

    Each number has a random weight of its own, so that changes that cancel out in a plain sum, as the first step of
    Adam makes them (+lr here, -lr there), do not in this one. Against mistakes, not against malice: see `digest`.
    """
    whole = {1: torch.int8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    weights = _weights(tensor.device)
    parts = torch.split(tensor.detach().reshape(-1).view(whole), _TOGETHER)
    sums = torch.stack([(part.long() * weights[: len(part)]).sum() for part in parts])
    total = 0
    for part in sums.tolist():
        total = (total * _ODD + part) % 2**64
    return tensor.dtype, tensor.shape, total


@cache
def _weights(device: torch.device) -> Tensor:
    """Random numbers of 64 bits, the same ones on every device and in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_TOGETHER,), generator=generator, device="cpu").to(device)


def _check_contiguous(name: str, target: Tensor) -> None:
    if not target.is_contiguous():
        raise UserError(f"{name} is not contiguous in memory: call .contiguous() on it before loading an adapter")


def _patch(name: str, entry: Entry, targets: dict[str, Tensor], bases: dict[str, Tensor]) -> Patch:
    if name not in targets:
        raise UserError(f"the model has no {name}, which the adapter changes: load the model it was made for")
    target = targets[name]
    if (tuple(target.shape), target.dtype) != (entry.shape, entry.dtype):
        raise UserError(
            f"{name} is {tuple(target.shape)} {target.dtype} in the model and {entry.shape} {entry.dtype} in the "
            "adapter: load the model as it was trained (labels, dtype)"
        )
    _check_contiguous(name, target)
    if entry.base_sha256 is not None and digest(target) != entry.base_sha256:
        raise UserError(f"{name} is not the base's that this adapter was made for: load that base, unchanged")
    index, values = entry.resolve(target, bases)
    return Patch(values, index, mark(target))
