"""What saving needs: the whole model without its wrappers and shards, and the base that it is compared with."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad.adapter.hub import is_hub_name, must_use_cache
from sparsegrad.adapter.merge import named_tensors
from sparsegrad.distributed import from_gathered, unwrap_compiled
from sparsegrad.errors import UserError, first_line
from sparsegrad.layers.replace import merge_shards, refuse_layers

Base = nn.Module | Mapping[str, Tensor] | str | Path
Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
_BASES = "give base= as the folder or hub id that the model came from, or as a copy of the model from before training"


def write_gathered(
    save: Callable[Concatenate[nn.Module, Arguments], Value],
) -> Callable[Concatenate[nn.Module, Arguments], Value]:
    """Let the main process alone call `save` for a model that FSDP2 shards, with whole weights on the CPU.

    All processes must call the result together; each gets what `save` returns, or its `UserError`.
    """

    @functools.wraps(save)
    def call(model: nn.Module, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        plain = unwrap_compiled(model)
        merge_shards(plain)
        return from_gathered(plain, lambda: save(model, *args, **kwargs))

    return call  # type: ignore[return-value]


def get_class_name(model: nn.Module) -> str:
    """The name of the model's class, without the prefix that FSDP2 puts before it."""
    return type(model).__name__.removeprefix("FSDP")


def plain_model(model: nn.Module) -> nn.Module:
    """The model that was compiled, or `model` itself; all functions of one model's adapters refer to this one.

    Raises:
        UserError: for a model that DDP wraps, whose names have a prefix.
    """
    model = unwrap_compiled(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"the model is wrapped by {type(model).__name__}: give the plain one, model.module")
    return model


def check_plain(model: nn.Module) -> None:
    """Raise `UserError` for a model that is wrapped or has layers of an engine: its names are not those of the base."""
    refuse_layers(plain_model(model))


def refuse_other_format(folder: Path, file: str, what: str) -> None:
    """Raise `UserError` if `folder` has `file`, which belongs to `what`: a folder holds one adapter, with its card."""
    if (folder / file).exists():
        raise UserError(f"folder={folder} has {what} ({file}): give another folder, or delete this one")


def find_base(model: nn.Module, base: Base | None) -> Base:
    """The base as it was given, or the name that `from_pretrained` stored in the model's configuration.

    Raises:
        UserError: if there is neither.
    """
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base is None or base == "":
        raise UserError(f"base=None: the model does not know where it came from; {_BASES}")
    return Path(base) if isinstance(base, os.PathLike) else base


def name_base(model: nn.Module, base: Base | None) -> str | None:
    """What a user loads the base by: its hub id, or the name of its folder, whose path is private; None if unknown."""
    for one in (base, model):
        name = one if isinstance(one, str | Path) else getattr(getattr(one, "config", None), "_name_or_path", None)
        if name:
            is_folder = Path(name).is_absolute() or Path(name).exists()
            return Path(os.path.abspath(name)).name if is_folder else str(name)  # "." alone has no name
    return None


def read_base(model: nn.Module, base: Base | None, mlp: Mapping[str, str]) -> tuple[dict[str, Tensor], set[str]]:
    """The base's tensors by name, and the names of tensors that only the model has."""
    base = find_base(model, base)
    if isinstance(base, str | Path):
        return _load_base(model, base, mlp)
    names = set(named_tensors(model))
    if isinstance(base, nn.Module):
        tensors = named_tensors(unwrap_compiled(base))
        if unknown := names ^ set(tensors):
            raise UserError(
                f"model and base differ in the tensors {format_names(unknown)}: give the plain model and its own base"
            )
        return tensors, set()
    if lacking := [name for name in mlp if name not in base]:
        found = format_names(set(base)) or "nothing"
        raise UserError(
            f"base= has no tensor {lacking[0]}, a SparseGrad weight of the model, but {found}: "
            "give tensors by the names of the plain model, as a copy of its state_dict() from before training has them"
        )
    return dict(base), names - set(base)


def _load_base(model: nn.Module, source: str | Path, mlp: Mapping[str, str]) -> tuple[dict[str, Tensor], set[str]]:
    """As `read_base`, for a hub id or folder."""
    loaded, missing = _load_pretrained(model, source)
    # `from_pretrained` initializes all missing tensors and only warns: if every MLP weight is missing, the files are of
    # another architecture.
    drawn = set(mlp) if missing.issuperset(mlp) else set()
    tensors, own = named_tensors(loaded), named_tensors(model)
    # Loaded in one dtype; parts of the model may have been converted, such as its normalization.
    tensors = {name: one.to(own[name].dtype) if name in own else one for name, one in tensors.items()}
    if unknown := drawn | set(own) - set(tensors):
        raise UserError(
            f"base={source} does not have {format_names(unknown)} of the model: name the base that it came from"
        )
    return tensors, missing


def _load_pretrained(model: nn.Module, source: str | Path) -> tuple[nn.Module, set[str]]:
    """Load the class of `model` from a hub id or folder; and the names of the tensors that are not in its files."""
    load = getattr(type(model), "from_pretrained", None)
    if load is None:
        raise UserError(
            f"base={source} cannot be loaded for a {type(model).__name__}: give a copy of the model instead"
        )
    options = {"local_files_only": True} if _is_cached(source) else {}
    try:
        # Initializing a new head must not change the caller's random state.
        with torch.random.fork_rng(), _without_report():
            dtype, config = next(model.parameters()).dtype, getattr(model, "config", None)
            loaded, info = load(str(source), config=config, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"base={source} has tensors of other shapes than the model, as after resizing its embeddings: give "
                "base= as a copy of the model from after the resizing and before training"
            ) from None
        raise UserError(f"base={source} cannot be loaded ({first_line(error)}): {_BASES}") from None
    return loaded, set(info["missing_keys"])


def _is_cached(source: str | Path) -> bool:
    """Whether the hub cannot be used now, but its cache has `source`; an error if that is nowhere."""
    if is_hub_name(source):
        return must_use_cache(str(source), f"base={source} (no folder here)", f"or {_BASES}")
    if not Path(source).exists():
        raise UserError(f"base={source}: there is no such folder; {_BASES}")
    return False


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from reporting the new head, which it has done when the user loaded the model."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def format_names(names: set[str]) -> str:
    """The first three names, and the number of others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
