"""Adapters of one model: load them from folders or the hub, keep them by name, and switch between them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.adapter.base import plain_model
from sparsegrad.adapter.format import DTYPES, HALVES, Entry, digest, read_adapter
from sparsegrad.adapter.hub import find_folder
from sparsegrad.adapter.merge import MERGED, Adapter, Patch, check_contiguous, check_present, mark, named_tensors
from sparsegrad.arguments import explained, show
from sparsegrad.errors import UserError, warn_renamed
from sparsegrad.targets import is_quantized

logger = logging.getLogger(__name__)
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
            for the compiled model is loaded for the plain one, and vice versa. Weights of a narrower dtype, such as
            bfloat16, are accepted if they have the same values: merging makes those that the adapter changes as wide as
            they were trained, and a warning says so. Target weights that the training left unchanged may also be
            quantized, or less precise than in the base; they are then not checked, and a warning says so.
        folder: a folder that `save_adapter` wrote, or a model repository of the Hugging Face hub (`org/name`), which
            needs the package `huggingface_hub`. If there is a folder of that name, it is used.
        adapter_name: a name by which `set_adapter` and `delete_adapter` find the adapter. None: the model does not
            keep it.
        revision: branch, tag or commit of the repository; only for the hub.
        token: access token for the hub; None uses the one that `hf auth login` stored.

    Raises:
        UserError: for a folder or repository that is missing, damaged or of another version; a model with other names,
            shapes, dtypes or base weights (by their sha256), or wrapped by DDP; weights that FSDP2 shards or that are
            offloaded; values that are not finite; a name that is in use; or a merged adapter whose weights were
            trained.
    """
    model = plain_model(model)
    if adapter_name is not None:
        _check_new_name(model, adapter_name)
    found = find_folder(folder, revision, token)
    facts, entries, bases = read_adapter(found)
    with disable_adapter(model):
        targets = named_tensors(model)
        source = str(facts.get("base", "that base"))
        _check_stayed(facts.get("stayed", {}), targets, source)
        patches = {name: _make_patch(name, entry, targets, bases, source) for name, entry in entries.items()}
        _check_widened(entries, targets, hashed=bool(facts.get("stayed")))
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


def _check_stayed(stayed: Any, targets: dict[str, Tensor], source: str) -> None:
    """Check the target weights that the training left as they were; adapters of earlier versions do not list them.

    The adapter does not write to them, so they may be quantized or of another dtype, and a warning names those that
    cannot be compared.
    """
    try:
        listed = {name: (tuple(one["shape"]), DTYPES[one["dtype"]], str(one["sha256"])) for name, one in stayed.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError("the adapter's list of target weights that stayed is inconsistent: save it again") from None
    unchecked = [name for name, one in listed.items() if not _is_checked(name, *one, targets, source)]
    if unchecked:
        logger.warning(
            "%d weights of the model, such as %s, are quantized or less precise than those that the adapter was saved "
            "with, and could not be compared: make sure that the model is %s",
            len(unchecked),
            unchecked[0],
            source,
        )


def _is_checked(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, sha256: str, targets: dict[str, Tensor], source: str
) -> bool:
    """Whether the model's tensor is the base's; False if it cannot be compared.

    Raises:
        UserError: if it is missing, or of another base.
    """
    if name not in targets:
        if any(other.startswith(f"{name.rpartition('.')[0]}.") for other in targets):  # such as a packed weight's
            return False
        raise UserError(f"the model has no {name}, which the adapter expects: load the model it was made for, {source}")
    target = targets[name]
    check_present(name, target)
    if is_quantized(target):
        return False
    if tuple(target.shape) != shape:
        raise _refuse_shape(name, target, shape, dtype)
    weight = target.detach().to(dtype)
    if digest(weight) == sha256:
        return True
    if torch.promote_types(target.dtype, dtype) != target.dtype:  # not all values of `dtype` are in the model's
        return False
    raise _refuse_base(name, weight, sha256, source)


def _refuse_base(name: str, target: Tensor, sha256: str, source: str) -> UserError:
    """The error for a tensor that does not have the base's `sha256`, or only once it is rounded."""
    for narrow in HALVES:
        if target.is_floating_point() and digest(target.to(narrow).to(target.dtype)) == sha256:
            return UserError(
                f"{name} was rounded to {narrow} before the training, but not in this model: load {source} with "
                f"dtype={narrow}, or round the model with .to({narrow})"
            )
    return UserError(
        f"{name} is not the base's that this adapter was made for: load {source} as it was before the training"
    )


def _make_patch(name: str, entry: Entry, targets: dict[str, Tensor], bases: dict[str, Tensor], source: str) -> Patch:
    """Check that an entry fits the model and its base weights, and compute the new values."""
    if name not in targets:
        raise UserError(f"the model has no {name}, which the adapter changes: load the model it was made for, {source}")
    target = targets[name]
    if tuple(target.shape) != entry.shape or not _is_at_least(entry.dtype, target.dtype):
        raise _refuse_dtype(name, target, entry)
    check_present(name, target)
    check_contiguous(name, target)
    base = target.detach().to(entry.dtype)  # the same tensor, unless the model's is narrower
    if entry.base_sha256 is not None and digest(base) != entry.base_sha256:
        is_narrow = target.dtype != entry.dtype
        raise _refuse_dtype(name, target, entry) if is_narrow else _refuse_base(name, base, entry.base_sha256, source)
    index, values = entry.resolve(base, bases)  # for form `rotated`, from the base's values
    return Patch(values, index, mark(target))


def _is_at_least(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `wide` is `dtype`, or holds every value of it where it has 16 bits."""
    return wide == dtype or (dtype in HALVES and wide in (torch.float32, torch.float64))


def _refuse_dtype(name: str, target: Tensor, entry: Entry) -> UserError:
    return _refuse_shape(name, target, entry.shape, entry.dtype)


def _refuse_shape(name: str, target: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> UserError:
    return UserError(
        f"{name} is {tuple(target.shape)} {target.dtype} in the model and {shape} {dtype} in the "
        "adapter: load the model as it was trained (labels, dtype)"
    )


def _check_widened(entries: dict[str, Entry], targets: dict[str, Tensor], *, hashed: bool) -> None:
    """Warn of tensors that merging makes wider; `hashed`: the adapter has hashes beside those of its entries."""
    wider = [name for name, entry in entries.items() if entry.dtype != targets[name].dtype]
    if not wider:
        return
    if not hashed and all(entry.base_sha256 is None for entry in entries.values()):
        # Nothing shows that the base was of the model's dtype before the training, too.
        raise _refuse_dtype(wider[0], targets[wider[0]], entries[wider[0]])
    logger.warning(
        "%d tensors of the model are %s and become %s when merged, as they were trained: call the merged model under "
        "torch.autocast, or load the adapter into model.float()",
        len(wider),
        targets[wider[0]].dtype,
        entries[wider[0]].dtype,
    )
