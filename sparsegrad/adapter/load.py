"""Adapters of one model: load them from folders or the hub, keep them by name, and switch between them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from sparsegrad.adapter.base import plain_model
from sparsegrad.adapter.format import Entry, digest, read_adapter
from sparsegrad.adapter.hub import find_folder
from sparsegrad.adapter.merge import MERGED, Adapter, Patch, check_contiguous, mark, named_tensors
from sparsegrad.arguments import explained, show
from sparsegrad.errors import UserError, warn_renamed

# Model -> its adapters by name. Weak keys: they are removed with their model, which they refer to only weakly.
_NAMED: weakref.WeakKeyDictionary[nn.Module, dict[str, Adapter]] = weakref.WeakKeyDictionary()


@explained()
def load_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Adapter:
    """Read and check an adapter; the model stays as it is until `Adapter.merge` or `set_adapter`.

    Any number of adapters of one base can be loaded, and `set_adapter` switches between them. If one is merged, it is
    unmerged for the time of the checks. Each adapter holds its values in memory; those of form `rotated` are as large
    as the weights themselves.

    Args:
        model: the base model, with the weights against which the adapter was saved. It may be compiled: what is loaded
            for the compiled model is loaded for the plain one, and vice versa.
        folder: a folder that `save_adapter` wrote, or a model repository of the Hugging Face hub (`org/name`), which
            needs the package `huggingface_hub`. If there is a folder of that name, it is used.
        adapter_name: a name by which `set_adapter` and `delete_adapter` find the adapter. None: the model does not
            keep it.
        revision: branch, tag or commit of the repository; only for the hub.
        token: access token for the hub; None uses the one that `hf auth login` stored.

    Raises:
        UserError: for a folder or repository that is missing, damaged or of another version; a model with other names,
            shapes, dtypes or base weights (by their sha256), or wrapped by DDP; values that are not finite; a name that
            is in use; or a merged adapter whose weights were trained.
    """
    model = plain_model(model)
    if adapter_name is not None:
        _check_new_name(model, adapter_name)
    found = find_folder(folder, revision, token)
    facts, entries, bases = read_adapter(found)
    with disable_adapter(model):
        targets = named_tensors(model)
        source = str(facts.get("base", "that base"))
        patches = {name: _make_patch(name, entry, targets, bases, source) for name, entry in entries.items()}
    adapter = Adapter(model, found, facts, patches, str(folder), adapter_name)
    if adapter_name is not None:
        _NAMED.setdefault(model, {})[adapter_name] = adapter
    return adapter


def _check_new_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise UserError(f"adapter_name={name!r} is not allowed: give a text, such as 'film'")
    if name in get_adapters(model):
        raise UserError(
            f"adapter_name={name} is in use: give another name, or call sparsegrad.delete_adapter(model, {name!r})"
        )


@explained()
def set_adapter(model: nn.Module, adapter: Adapter | str | None) -> None:
    """Merge `adapter` into `model` in place of any other; None restores the base.

    Args:
        model: the model for which the adapter was loaded.
        adapter: the adapter, or the `adapter_name` under which it was loaded. One at a time: changes are not added up.

    Raises:
        UserError: for an unknown name or an adapter of another model, before anything changes; if the merged weights
            were trained, which keeps them; if `adapter` cannot be merged, which leaves the base. See `Adapter.merge`
            and `Adapter.unmerge`.
    """
    model = plain_model(model)
    if isinstance(adapter, str):
        adapter = _find(model, adapter)
    elif adapter is not None and not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter is {show(adapter)}, which is not allowed: give one adapter, its name, or None for the base"
        )
    if adapter is not None and not adapter.belongs_to(model):
        raise UserError(f"the adapter of {adapter.source} was loaded for another model: load it for this one")
    merged = MERGED.get(model)
    if merged is adapter:
        return
    if merged is not None:
        merged.unmerge()
    if adapter is not None:
        adapter.merge()


@explained()
def get_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that were loaded with an `adapter_name`, by name, in the order of loading."""
    return dict(_NAMED.get(plain_model(model), {}))


@explained()
def active_adapter(model: nn.Module) -> str | None:
    """The name of the merged adapter, or its source if it was loaded without a name; None if the model is the base."""
    merged = MERGED.get(plain_model(model))
    if merged is None:
        return None
    return merged.source if merged.name is None else merged.name


@explained()
def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter and free its memory; if it is merged, the base is restored first. Its files stay.

    Raises:
        UserError: for an unknown name; or if the adapter is merged and its weights were trained, which keeps both.
    """
    adapter = _find(model, adapter_name)
    if adapter.merged:
        adapter.unmerge()
    del _NAMED[plain_model(model)][adapter_name]


@explained()
@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Restore the base for the time of a `with` block, then merge the same adapter again.

    Raises:
        UserError: if the merged weights were trained, before the block; after it, if the block changed weights that
            the adapter changes, or merged another adapter.
    """
    merged = MERGED.get(plain_model(model))
    if merged is not None:
        merged.unmerge()
    try:
        yield
    finally:
        if merged is not None:
            merged.merge()


def switch(model: nn.Module, adapter: Adapter | None) -> None:
    """The earlier name of `set_adapter`."""
    warn_renamed("sparsegrad.switch", "sparsegrad.set_adapter")
    set_adapter(model, adapter)


def _find(model: nn.Module, name: str) -> Adapter:
    named = get_adapters(model)
    if name not in named:
        raise UserError(
            f"the model has no adapter {name}, only {', '.join(named) or 'none'}: load it with "
            f"sparsegrad.load_adapter(model, folder, adapter_name={name!r})"
        )
    return named[name]


def _make_patch(name: str, entry: Entry, targets: dict[str, Tensor], bases: dict[str, Tensor], source: str) -> Patch:
    """Check that an entry fits the model and its base weights, and compute the new values."""
    if name not in targets:
        raise UserError(f"the model has no {name}, which the adapter changes: load the model it was made for, {source}")
    target = targets[name]
    if (tuple(target.shape), target.dtype) != (entry.shape, entry.dtype):
        raise UserError(
            f"{name} is {tuple(target.shape)} {target.dtype} in the model and {entry.shape} {entry.dtype} in the "
            "adapter: load the model as it was trained (labels, dtype)"
        )
    check_contiguous(name, target)
    if entry.base_sha256 is not None and digest(target) != entry.base_sha256:
        raise UserError(
            f"{name} is not the base's that this adapter was made for: load {source} as it was before the training"
        )
    index, values = entry.resolve(target, bases)  # for form `rotated`, from the base's values
    return Patch(values, index, mark(target))
