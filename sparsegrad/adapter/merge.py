"""Merging: exchange the values of an adapter with those of the model, and back, bit for bit.

An adapter stores each changed tensor in the smallest of these forms:
    whole    its new values;
    sparse   flat positions and new values of the entries that differ;
    rotated  only with a tolerance: kept entries of V^T (W' - W) U, and the columns of U and V that they need.

`whole` and `sparse` hold values instead of differences, because in floating point W + (W' - W) is not W'. So a merged
adapter restores the trained model bit for bit, and `unmerge` the base.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.bits import as_integers
from sparsegrad.distributed import is_shard
from sparsegrad.errors import UserError

# Model -> the adapter that is merged into it. Weak keys: the entry is removed with its model.
MERGED: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
# Numbers whose bits are summed at a time: they fit into a CPU's cache, and a GPU needs no copy of the whole tensor.
_TOGETHER = 2**16
_ODD = 0x9E3779B97F4A7C15  # an arbitrary odd 64-bit number

Mark = tuple[torch.dtype, torch.Size, int]
"""Dtype, shape and weighted sum of the bits of a tensor; if it differs, the tensor was changed."""


@dataclass
class Patch:
    """Values to exchange with one tensor of the model: all of them, or those at flat positions `index`.

    Values of a wider dtype than the tensor's widen all of it; the exchange back narrows it again. Both are exact, as
    the entries without new values are still those of the narrower dtype.

    Attributes:
        values: values (n,) of the trained model; while merged, those of the base.
        index: flat positions (n,) of `values`; None if they are all entries.
        now: mark of the model's tensor as this adapter last left it.
        other: its mark after the next exchange; None before the first merge.
    """

    values: Tensor
    index: Tensor | None
    now: Mark
    other: Mark | None = None

    @torch.no_grad()
    def swap(self, target: Tensor) -> None:
        """Exchange the values with those of `target`, bit for bit; both stay on their devices.

        All memory is allocated before the first write, and an interruption of the write is undone, so that an error
        leaves both unchanged.
        """
        with torch.inference_mode(target.is_inference()):  # else what is widened in inference mode could never train
            self._swap(target)

    def _swap(self, target: Tensor) -> None:
        data = target.detach()
        flat, whole = data.view(-1), data.to(self.values.dtype)  # the same memory, unless the dtype changes
        index = slice(None) if self.index is None else self.index.to(flat.device)
        old = flat[index].to(self.values.device, copy=True)
        # Assignment to a slice copies between devices; assignment by positions needs the values on the same device.
        new = self.values if self.index is None else self.values.to(flat.device)
        try:
            whole.view(-1)[index] = new
            _set_data(target, whole)
            self.values = old
        except BaseException:  # KeyboardInterrupt is raised between two lines: else the old values would be lost
            flat[index] = old.to(flat.device)
            _set_data(target, data)
            raise


class Adapter:
    """An adapter of one model, loaded by `load_adapter` and checked. The model is unchanged until `merge`.

    Attributes:
        folder: the folder of its files; for an adapter of the hub a folder in the hub's cache.
        facts: the JSON that describes it.
        source: what `load_adapter` was given: a folder or the name of a repository.
        name: name under which the model keeps it; None without `adapter_name`.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        facts: dict[str, Any],
        patches: dict[str, Patch],
        source: str,
        name: str | None = None,
    ) -> None:
        self.folder, self.facts, self.source, self.name = folder, facts, source, name
        self._model, self._patches = weakref.ref(model), patches

    def __repr__(self) -> str:
        state = "merged" if self.merged else "not merged"
        name = "" if self.name is None else f"name={self.name!r}, "
        base = self.facts.get("base")
        return f"Adapter({self.source!r}, {name}base={base!r}, {len(self._patches)} tensors, {state})"

    @property
    def merged(self) -> bool:
        """Whether the model now has this adapter's weights."""
        model = self._model()
        return model is not None and MERGED.get(model) is self

    def merge(self) -> None:
        """Give the model the trained weights, in place.

        Tensors of a narrower dtype than the trained ones, such as those of a base in bfloat16, are widened until
        `unmerge`. If others stay narrow, call the model under `torch.autocast`.

        If it fails halfway, e.g. for lack of memory, the tensors exchanged so far are restored first.

        Raises:
            UserError: when this or another adapter is already merged, or the weights that the adapter changes were
                modified, sharded or offloaded since it was loaded or unmerged.
        """
        model = self._get_model()
        if model in MERGED:
            which = "this adapter" if self.merged else f"the adapter of {MERGED[model].source}"
            raise UserError(
                f"{which} is merged already: unmerge it first, or call sparsegrad.set_adapter(model, adapter)"
            )
        self._swap(self._get_unmodified(model, "load the base and the adapter again"))
        MERGED[model] = self

    def unmerge(self) -> None:
        """Restore the base weights of the model, bit for bit. If it fails halfway, the model stays merged.

        Raises:
            UserError: when the adapter is not merged, or the merged weights were modified, e.g. by training.
        """
        model = self._get_model()
        if not self.merged:
            raise UserError(f"the adapter of {self.source} is not merged: there is nothing to unmerge")
        remedy = "save what you trained as an adapter of its own, and load the base again"
        self._swap(self._get_unmodified(model, remedy))
        del MERGED[model]

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether it was loaded for this very model."""
        return self._model() is model

    def _swap(self, targets: dict[str, Tensor]) -> None:
        """Exchange all values, or none of them if there is an error."""
        before = {name: patch.values for name, patch in self._patches.items()}
        try:
            for name, patch in self._patches.items():
                patch.swap(targets[name])
            marks = {name: patch.other or mark(targets[name]) for name, patch in self._patches.items()}
        except BaseException:  # KeyboardInterrupt too: half a merge must not remain
            for name, patch in self._patches.items():
                if patch.values is not before[name]:
                    patch.swap(targets[name])
            raise
        # Only after everything has succeeded. The next exchange reverses this one, so the marks swap places.
        for name, patch in self._patches.items():
            patch.now, patch.other = marks[name], patch.now

    def _get_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise UserError("the model of this adapter no longer exists: load both again")
        return model

    def _get_unmodified(self, model: nn.Module, remedy: str) -> dict[str, Tensor]:
        """The model's current tensors by name, after a check that nobody modified them.

        They are looked up by name, because `model.to(device)` may have replaced the tensors that were there at loading.
        They are compared by their bits, because torch's version counter misses the writes of its fused optimizers.
        """
        tensors = named_tensors(model)
        for name, patch in self._patches.items():
            if name in tensors:
                check_present(name, tensors[name])
            if name in tensors and tensors[name].dtype != patch.now[0]:
                raise UserError(
                    f"{name} was converted from {patch.now[0]} to {tensors[name].dtype} since this adapter was loaded, "
                    "merged or unmerged: convert the model before load_adapter, or after the last unmerge"
                )
            if name not in tensors or mark(tensors[name]) != patch.now:
                raise UserError(f"{name} was changed since this adapter was loaded, merged or unmerged: {remedy}")
            check_contiguous(name, tensors[name])
        return {name: tensors[name] for name in self._patches}


def _set_data(target: Tensor, data: Tensor) -> None:
    """Give a tensor values of another dtype; it stays the same object, to which modules may be tied."""
    if target.dtype != data.dtype:
        target.data = data


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once; tied tensors under their first name."""
    saved = set(model.state_dict())  # buffers with persistent=False are not part of a model's files
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def mark(tensor: Tensor) -> Mark:
    """The mark of a tensor, equal on every device. It costs about as much as reading the tensor once.

    Each number has a random weight, so that changes that cancel out in a plain sum, such as the +lr and -lr of Adam's
    first step, do not cancel out here. It detects mistakes, but not deliberate changes: see `digest` for those.
    """
    weights = _draw_weights(tensor.device)
    parts = torch.split(as_integers(tensor.reshape(-1)), _TOGETHER)
    # Products and sums wrap around at 64 bits, which is exact modulo 2^64 on every device.
    sums = torch.stack([(part.long() * weights[: len(part)]).sum() for part in parts])
    total = 0
    for part in sums.tolist():
        total = (total * _ODD + part) % 2**64
    return tensor.dtype, tensor.shape, total


@cache
def _draw_weights(device: torch.device) -> Tensor:
    """Random 64-bit numbers, the same on every device and in every call: drawn on the CPU, then moved."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_TOGETHER,), generator=generator, device="cpu").to(device)


def check_present(name: str, target: Tensor) -> None:
    """Raise `UserError` for a tensor of which this process does not have all values."""
    if is_shard(target):
        raise UserError(
            f"{name} is cut into shards (FSDP2, tensor parallelism), and an adapter needs whole weights: load and "
            "merge the adapter before fully_shard, or load the model without shards"
        )
    if target.is_meta:
        raise UserError(
            f"{name} has no values (device meta), as with weights that are offloaded to the CPU or a disk: load the "
            "model without offloading, such as with device_map=None"
        )


def check_contiguous(name: str, target: Tensor) -> None:
    if not target.is_contiguous():
        raise UserError(
            f"{name} is not contiguous in memory: before loading an adapter, run t = model.state_dict(keep_vars=True)"
            f"[{name!r}]; t.data = t.data.contiguous()"
        )
