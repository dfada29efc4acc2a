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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.adapter_file import Entry, digest, read_adapter
from sparsegrad.errors import UserError

# Which adapter is merged into a model; a model that is gone takes its entry along.
_MERGED: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
# Name -> torch's count of in-place writes when an adapter last checked or swapped that tensor: another count means
# that somebody trained it. Reading it costs nothing, hashing the weights again would.
_VERSIONS: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()


@dataclass
class Patch:
    """New values of one tensor: of all of it, or at flat positions `index`. `swap` exchanges them with the model's."""

    target: Tensor
    values: Tensor
    index: Tensor | None

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange: merged becomes base and base merged, bit for bit, in the memory of the values alone."""
        flat = self.target.detach().view(-1)
        index = slice(None) if self.index is None else self.index.to(flat.device)
        old = flat[index].clone()
        flat[index] = self.values.to(flat.device)
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

        Raises:
            UserError: when this or another adapter is merged already, or the model's weights have changed since the
                adapter was loaded or unmerged.
        """
        model = self._living()
        if model in _MERGED:
            which = "this adapter" if self.merged else f"the adapter of {_MERGED[model].folder}"
            raise UserError(f"{which} is merged already: unmerge it first, or call sparsegrad.switch(model, adapter)")
        self._check_untouched(model, "load the base and the adapter again")
        self._swap(model)
        _MERGED[model] = self

    def unmerge(self) -> None:
        """Give the model its base weights back, bit for bit.

        Raises:
            UserError: when it is not merged, or the merged weights have been trained meanwhile.
        """
        model = self._living()
        if not self.merged:
            raise UserError(f"the adapter of {self.folder} is not merged: there is nothing to unmerge")
        self._check_untouched(model, "save what you trained as an adapter of its own, and load the base again")
        self._swap(model)
        del _MERGED[model]

    def _swap(self, model: nn.Module) -> None:
        for name, patch in self._patches.items():
            patch.swap()
            _VERSIONS[model][name] = patch.target._version

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise UserError("the model of this adapter is gone: load both again")
        return model

    def _check_untouched(self, model: nn.Module, remedy: str) -> None:
        for name, patch in self._patches.items():
            if (patch.target._version, patch.target.dtype) != (_VERSIONS[model][name], patch.values.dtype):
                raise UserError(f"{name} was changed since this adapter was loaded, merged or unmerged: {remedy}")


def load_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """Read and check the adapter in `folder`; the model stays as it is until `Adapter.merge`.

    Several adapters of one base may be loaded; `switch` changes between them. Load them before any is merged. Each
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
    _VERSIONS.setdefault(model, {}).update({name: patch.target._version for name, patch in patches.items()})
    return Adapter(model, Path(folder), facts, patches)


def switch(model: nn.Module, adapter: Adapter | None) -> None:
    """Make `adapter` the one that is merged into `model`; None: the base alone.

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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once; tied ones under their first name."""
    saved = set(model.state_dict())
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def _patch(name: str, entry: Entry, targets: dict[str, Tensor], bases: dict[str, Tensor]) -> Patch:
    if name not in targets:
        raise UserError(f"the model has no {name}, which the adapter changes: load the model it was made for")
    target = targets[name]
    if (tuple(target.shape), target.dtype) != (entry.shape, entry.dtype):
        raise UserError(
            f"{name} is {tuple(target.shape)} {target.dtype} in the model and {entry.shape} {entry.dtype} in the "
            "adapter: load the model as it was trained (labels, dtype)"
        )
    if not target.is_contiguous():
        raise UserError(f"{name} is not contiguous in memory: call .contiguous() on it before loading an adapter")
    if entry.base_sha256 is not None and digest(target) != entry.base_sha256:
        raise UserError(f"{name} is not the base's that this adapter was made for: load that base, unchanged")
    index, values = entry.resolve(target, bases)
    return Patch(target, values, index)
