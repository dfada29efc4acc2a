"""Save an adapter: find what differs from the base, choose the smallest form of each tensor, write a model card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sparsegrad.adapter.card import write_card
from sparsegrad.adapter.format import BASIS_PARTS, DTYPES, Entry, digest, write_adapter
from sparsegrad.adapter.merge import named_tensors
from sparsegrad.adapter.sizes import Saved, summarize
from sparsegrad.basis import Basis
from sparsegrad.distributed import from_gathered
from sparsegrad.errors import UserError, check_number, first_line, renamed_arguments
from sparsegrad.layers.replace import merge_shards, refuse_layers
from sparsegrad.optim.summary import describe
from sparsegrad.targets import Names, find_mlp

Base = nn.Module | Mapping[str, Tensor] | str | Path
_SMALL = 2**16  # entries; smaller tensors outside the MLP are stored whole, such as a head, which no base has
# Bytes of a number -> an integer type of that size. Compared as integers, NaN equals itself and 0.0 differs from -0.0.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

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
        plain = _unwrap_compiled(model)
        merge_shards(plain)
        return from_gathered(plain, lambda: save(model, *args, **kwargs))

    return call  # type: ignore[return-value]


@renamed_arguments(quiet=True, mlp="target_modules")
@write_gathered
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: Base | None = None,
    optimizer: Any = None,
    *,
    tolerance: float = 0.0,
    target_modules: Names | None = None,
) -> Saved:
    """Write what training changed in `model` to `folder`: safetensors, JSON, and a model card README.md.

    Args:
        model: the trained model, with ordinary linears: after engine `fast` or `layer` call `to_linears` first. It must
            not be wrapped by DDP or similar. A model compiled by `torch.compile` is accepted, and so is one that FSDP2
            shards: all processes then call this together, and the main process gathers the weights and writes.
        folder: created if needed. An existing adapter is replaced, but a README.md that was written or edited by hand
            is not.
        base: the model before training: a hub id or folder, which is loaded again for the comparison; a model; or
            tensors by name, which may lack those of a new head. None uses the name that `from_pretrained` stored in the
            model's configuration, as in `peft`.
        optimizer: what `prepare` returned. It determines which weights are SparseGrad, their bases and their number of
            kept entries. None: the weights of `target_modules`.
        tolerance: 0 stores the model bit for bit. With a larger value, the change of an MLP weight may be stored as
            kept entries of the rotated space, if that is smaller. They then miss at most this share of the change
            (Frobenius norm). Needs `optimizer`.
        target_modules: without `optimizer`, which weights are SparseGrad, as given to `prepare`; None detects a known
            layout. `mlp=` is an alias.

    Returns:
        The sizes of what was stored.

    Raises:
        UserError: for a base that cannot be loaded, has other tensors or lacks SparseGrad weights; a model that equals
            its base; weights that are not finite or of an unsupported dtype; or a folder that cannot be written.
    """
    check_number("tolerance", tolerance, at_least=0, below=1)
    model = _unwrap_compiled(model)
    _check_plain(model)
    if tolerance and optimizer is None:
        raise UserError(f"tolerance={tolerance} needs the bases: give optimizer=, what sparsegrad.prepare returned")
    kinds = _find_kinds(model, optimizer, target_modules)
    source, before, new = _read_base(model, base, kinds)
    entries = _compare(named_tensors(model), before, new, kinds)
    if not entries:
        raise UserError("the model equals its base in every weight: train it first, or name the base it came from")
    bases: dict[str, Tensor] = {}
    if tolerance:  # 0 forbids the rotated form, which cannot restore a weight bit for bit
        for group in optimizer.param_groups:
            if group.get("kind") is not None and group["basis"] is not None:
                _rotate_kind(group, named_tensors(model), before, entries, bases, tolerance)
    saved = summarize(Path(folder), entries, bases, kinds, optimizer)
    facts = {"base": source, "model": _get_class_name(model), "tolerance": tolerance, "mlp": kinds}
    write_adapter(Path(folder), facts, entries, bases)
    write_card(Path(folder), source, _get_class_name(model), str(saved), tolerance)
    return saved


def _unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model that was compiled, which shares every weight; or `model` itself."""
    return getattr(model, "_orig_mod", model)


def _get_class_name(model: nn.Module) -> str:
    """The name of the model's class, without the prefix that FSDP2 puts before it."""
    return type(model).__name__.removeprefix("FSDP")


def _check_plain(model: nn.Module) -> None:
    """Raise `UserError` for a model that is wrapped or has layers of an engine: its names are not those of the base."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"the model is wrapped by {type(model).__name__}: save the plain one, model.module")
    refuse_layers(model)


def _find_kinds(model: nn.Module, optimizer: Any, names: Names | None) -> dict[str, str]:
    """Parameter name -> layer kind of the SparseGrad weights."""
    if optimizer is None:
        return {f"{name}.weight": kind for kind, found in find_mlp(model, names).items() for name in found}
    if names is not None:
        raise UserError(
            f"target_modules={names} and optimizer=: give one of them, since the optimizer knows its weights"
        )
    tensors = named_tensors(model)
    kinds = {_strip_compiled(tensors, name): group.kind for group in describe(optimizer).taken for name in group.names}
    if unknown := set(kinds) - set(tensors):
        raise UserError(
            f"the optimizer trains {_format_names(unknown)}, which the model does not have: give the model that was "
            "prepared, not wrapped; or leave out optimizer="
        )
    return kinds


def _strip_compiled(tensors: Mapping[str, Tensor], name: str) -> str:
    """The name of a parameter in the plain model, if the model was compiled when it was prepared."""
    return name if name in tensors else name.replace("_orig_mod.", "")


def _read_base(model: nn.Module, base: Base | None, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    """The base's name, its tensors by name, and the names of tensors that only the model has."""
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base is None or base == "":
        raise UserError("base=None: the model does not know where it came from; give base=, its hub id or a copy of it")
    if isinstance(base, str | Path):
        return _load_base(model, str(base), mlp)
    names = set(named_tensors(model))
    if isinstance(base, nn.Module):
        tensors = named_tensors(_unwrap_compiled(base))
        if unknown := names ^ set(tensors):
            raise UserError(
                f"model and base differ in the tensors {_format_names(unknown)}: give the plain model and its own base"
            )
        return _get_class_name(model), tensors, set()
    if lacking := [name for name in mlp if name not in base]:
        found = _format_names(set(base)) or "nothing"
        raise UserError(
            f"base= has no tensor {lacking[0]}, a SparseGrad weight of the model, but {found}: "
            "give tensors by the names of the plain model, as a copy of its state_dict() from before training has them"
        )
    return _get_class_name(model), dict(base), names - set(base)


def _load_base(model: nn.Module, source: str, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    """As `_read_base`, for a hub id or folder."""
    load = getattr(type(model), "from_pretrained", None)
    if load is None:
        raise UserError(
            f"base={source} cannot be loaded for a {type(model).__name__}: give a copy of the model instead"
        )
    try:
        with torch.random.fork_rng():  # initializing a new head must not change the caller's random state
            dtype = next(model.parameters()).dtype
            loaded, info = load(source, config=getattr(model, "config", None), dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"base={source} has tensors of other shapes than the model, as after resizing its embeddings: give "
                "base= as a copy of the model from after the resizing and before training"
            ) from None
        raise UserError(
            f"base={source} cannot be loaded ({first_line(error)}): give base= as a folder or a copy of it"
        ) from None
    tensors, new = named_tensors(loaded), set(info["missing_keys"])
    # `from_pretrained` initializes all missing tensors and only warns: if every MLP weight is missing, the files are of
    # another architecture.
    drawn = set(mlp) if new.issuperset(mlp) else set()
    if unknown := drawn | set(named_tensors(model)) - set(tensors):
        raise UserError(
            f"base={source} does not have {_format_names(unknown)} of the model: name the base that it came from"
        )
    name = Path(source).name if Path(source).exists() else source  # the local path of a folder is private
    return name, tensors, new


def _compare(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], new: set[str], mlp: Mapping[str, str]
) -> dict[str, Entry]:
    """Entries of all tensors whose bits differ from those of the base."""
    entries = {}
    for name, tensor in tensors.items():
        old = None if name in new else before[name]
        if old is not None and (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{name} is {tuple(old.shape)} {old.dtype} in the base and {tuple(tensor.shape)} {tensor.dtype} in the "
                "model: give the base that the model was trained from"
            )
        if old is not None and torch.equal(_view_bytes(old), _view_bytes(tensor)):
            continue
        _check_storable(name, tensor)
        entries[name] = _make_entry(tensor, old, name in mlp)
    return entries


def _view_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor, on the CPU, so that the comparison does not depend on the dtype."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _check_storable(name: str, tensor: Tensor) -> None:
    """Raise `UserError` for an unsupported dtype, or values that are not finite."""
    if str(tensor.dtype) not in DTYPES:
        raise UserError(
            f"{name} is {tensor.dtype}, which an adapter cannot store; it stores {', '.join(DTYPES)}: convert it in "
            "the model and its base, or register the buffer with persistent=False"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} is not finite: the training diverged; go back to an earlier checkpoint")


def _make_entry(tensor: Tensor, before: Tensor | None, is_mlp: bool) -> Entry:
    """The entry of a tensor that differs from that of the base, or that the base does not have."""
    after = tensor.detach().cpu().contiguous().view(-1)
    if before is None:
        return Entry("whole", tuple(tensor.shape), tensor.dtype, None, after.clone())
    old = before.detach().cpu().contiguous()
    bits = _INTEGERS[after.element_size()]
    index = (after.view(bits) != old.view(-1).view(bits)).nonzero().flatten()
    return _choose_form(after, old, index, is_mlp)


def _choose_form(after: Tensor, before: Tensor, index: Tensor, is_mlp: bool) -> Entry:
    """Form `sparse` if that saves bytes, otherwise `whole`. `after` is flat (n,), `before` has the tensor's shape."""
    # Positions take as much space as the values of float32: int32 wherever it is enough.
    index = index.to(torch.int32 if after.numel() < 2**31 else torch.int64)
    sparse = Entry("sparse", tuple(before.shape), after.dtype, None, after[index.long()].clone(), index)
    if sparse.size < after.nbytes and (is_mlp or after.numel() > _SMALL):
        return Entry("sparse", sparse.shape, sparse.dtype, digest(before), sparse.values, index)
    return Entry("whole", sparse.shape, sparse.dtype, digest(before) if is_mlp else None, after.clone())


def _rotate_kind(
    group: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    entries: dict[str, Entry],
    bases: dict[str, Tensor],
    tolerance: float,
) -> None:
    """Replace the entries of one kind by their rotated form, if that is smaller including the basis."""
    basis: Basis = group["basis"].to("cpu", torch.float64)
    U, V = basis.in_basis, basis.out_basis
    if U is None or V is None:  # with one side rotated the change is not sparse enough to save anything
        return
    names = [name for name in (_strip_compiled(tensors, own) for own in group["param_names"]) if name in entries]
    cores = {name: _rotate_change(basis, tensors[name], before[name], tolerance) for name in names}
    # Only rows and columns with a nonzero entry in any core are stored, and only their columns of the basis.
    used = torch.stack([core != 0 for core in cores.values()]).any(0) if cores else torch.zeros(1, 1)
    rows, columns = used.any(1), used.any(0)  # (out,) and (in,)
    rotated = {}
    for name, core in cores.items():
        flat = core[rows][:, columns].flatten()
        index = flat.nonzero().flatten().to(torch.int32)
        old, kind = entries[name], group["kind"]
        values = flat[index.long()].float()
        rotated[name] = Entry("rotated", old.shape, old.dtype, digest(before[name]), values, index, kind)
    matrices = (V[:, rows].float(), U[:, columns].float())  # (out, c) and (in, r)
    size = sum(matrix.nbytes for matrix in matrices) + sum(entry.size for entry in rotated.values())
    if cores and size < sum(entries[name].size for name in names):
        entries.update(rotated)
        bases.update({f"{group['kind']}.{part}": matrix for part, matrix in zip(BASIS_PARTS, matrices, strict=True)})


def _rotate_change(basis: Basis, after: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """The rotated change (out, in), without its smallest entries, which are at most `tolerance` of its norm."""
    core = basis.rotate(after.detach().cpu().double() - before.detach().cpu().double())
    energy, order = core.flatten().square().sort()  # the basis is orthogonal: the same norm as the change of W
    dropped = order[energy.cumsum(0) <= tolerance**2 * energy.sum()]
    core.view(-1)[dropped] = 0
    return core


def _format_names(names: set[str]) -> str:
    """The first three names, and the number of others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
