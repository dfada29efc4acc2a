"""What saving needs: the whole model without its wrappers and shards, and the base that it is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad.adapter.hub import must_use_cache
from sparsegrad.adapter.merge import named_tensors
from sparsegrad.distributed import from_gathered
from sparsegrad.errors import UserError, first_line
from sparsegrad.layers.replace import merge_shards, refuse_layers

Base = nn.Module | Mapping[str, Tensor] | str | Path
Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


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


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model that was compiled, which shares every weight; or `model` itself."""
    return getattr(model, "_orig_mod", model)


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


def find_base(model: nn.Module, base: Base | None) -> Base:
    """The base as it was given, or the name that `from_pretrained` stored in the model's configuration.

    Raises:
        UserError: if there is neither.
    """
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base is None or base == "":
        raise UserError(
            "base=None: the model does not know where it came from; give base=, its hub id or folder, or a copy of the "
            "model from before training"
        )
    return base


def read_base(model: nn.Module, base: Base | None, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    """The base's name, its tensors by name, and the names of tensors that only the model has."""
    base = find_base(model, base)
    if isinstance(base, str | Path):
        return _load_base(model, str(base), mlp)
    names = set(named_tensors(model))
    if isinstance(base, nn.Module):
        tensors = named_tensors(unwrap_compiled(base))
        if unknown := names ^ set(tensors):
            raise UserError(
                f"model and base differ in the tensors {format_names(unknown)}: give the plain model and its own base"
            )
        return get_class_name(model), tensors, set()
    if lacking := [name for name in mlp if name not in base]:
        found = format_names(set(base)) or "nothing"
        raise UserError(
            f"base= has no tensor {lacking[0]}, a SparseGrad weight of the model, but {found}: "
            "give tensors by the names of the plain model, as a copy of its state_dict() from before training has them"
        )
    return get_class_name(model), dict(base), names - set(base)


def _load_base(model: nn.Module, source: str, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    """As `read_base`, for a hub id or folder."""
    loaded, missing = _load_pretrained(model, source)
    # `from_pretrained` initializes all missing tensors and only warns: if every MLP weight is missing, the files are of
    # another architecture.
    drawn = set(mlp) if missing.issuperset(mlp) else set()
    tensors = named_tensors(loaded)
    if unknown := drawn | set(named_tensors(model)) - set(tensors):
        raise UserError(
            f"base={source} does not have {format_names(unknown)} of the model: name the base that it came from"
        )
    name = Path(source).name if Path(source).exists() else source  # the local path of a folder is private
    return name, tensors, missing


def _load_pretrained(model: nn.Module, source: str) -> tuple[nn.Module, set[str]]:
    """Load the class of `model` from a hub id or folder; and the names of the tensors that are not in its files."""
    load = getattr(type(model), "from_pretrained", None)
    if load is None:
        raise UserError(
            f"base={source} cannot be loaded for a {type(model).__name__}: give a copy of the model instead"
        )
    away = not Path(source).exists() and must_use_cache(source, "or give base= as a folder or a copy of it")
    options = {"local_files_only": True} if away else {}
    try:
        with torch.random.fork_rng():  # initializing a new head must not change the caller's random state
            dtype, config = next(model.parameters()).dtype, getattr(model, "config", None)
            loaded, info = load(source, config=config, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"base={source} has tensors of other shapes than the model, as after resizing its embeddings: give "
                "base= as a copy of the model from after the resizing and before training"
            ) from None
        raise UserError(
            f"base={source} cannot be loaded ({first_line(error)}): give base= as a folder or a copy of it"
        ) from None
    return loaded, set(info["missing_keys"])


def format_names(names: set[str]) -> str:
    """The first three names, and the number of others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
