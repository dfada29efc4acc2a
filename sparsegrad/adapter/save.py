"""Save an adapter: find what differs from the base, choose the smallest form of each tensor, write a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.adapter.base import (
    Base,
    check_plain,
    find_base,
    format_names,
    get_class_name,
    name_base,
    read_base,
    refuse_other_format,
    write_gathered,
)
from sparsegrad.adapter.card import write_card
from sparsegrad.adapter.changes import find_changed, find_narrow, list_trainable
from sparsegrad.adapter.format import BASIS_PARTS, Entry, add_rotated, digest, write_adapter
from sparsegrad.adapter.lora_files import CONFIG
from sparsegrad.adapter.merge import named_tensors
from sparsegrad.adapter.sizes import Saved, summarize
from sparsegrad.arguments import explained
from sparsegrad.basis import Basis
from sparsegrad.bits import as_integers
from sparsegrad.distributed import unwrap_compiled
from sparsegrad.errors import UserError, check_number, renamed_arguments
from sparsegrad.optim.summary import describe, list_weights
from sparsegrad.targets import Linears, Names, find_mlp, is_quantized

_TRIES = 3  # to keep the tolerance in spite of rounding
_SMALL = 2**16  # entries; smaller tensors outside the MLP are stored whole, such as a head, which no base has


@renamed_arguments(quiet=True, mlp="target_modules")
@explained({"rank": "save_lora has it, which writes LoRA matrices of that rank"})
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
            (Frobenius norm), rounding included. They are float32, so that a float64 weight needs a tolerance above
            about 1e-7 for it. Needs `optimizer`.
        target_modules: without `optimizer`, which weights are SparseGrad, as given to `prepare`; None detects a known
            layout. `mlp=` is an alias.

    Returns:
        The sizes of what was stored.

    Raises:
        UserError: for a base that cannot be loaded, has other tensors, lacks SparseGrad weights or shares memory with
            the model; a model that equals its base; weights that are not finite or of an unsupported dtype; or a folder
            that cannot be written or holds a LoRA adapter.
    """
    refuse_other_format(Path(folder), CONFIG, "a LoRA adapter")
    return write_changes(model, folder, base, optimizer, tolerance=tolerance, target_modules=target_modules)


def write_changes(
    model: nn.Module,
    folder: str | Path,
    base: Base | None = None,
    optimizer: Any = None,
    *,
    tolerance: float = 0.0,
    target_modules: Names | None = None,
) -> Saved:
    """As `save_adapter`, for a model without shards; a LoRA adapter in `folder` stays, except for its card."""
    check_number("tolerance", tolerance, at_least=0, below=1)
    model = unwrap_compiled(model)
    check_plain(model)
    if tolerance and optimizer is None:
        raise UserError(f"tolerance={tolerance} needs the bases: give optimizer=, what sparsegrad.prepare returned")
    base = find_base(model, base)  # before the search for the weights, whose error would hide that it is missing
    kinds = _find_kinds(model, optimizer, target_modules)
    before, new = read_base(model, base, kinds)
    entries = {
        name: _make_entry(tensor, None if name in new else before[name], name in kinds)
        for name, tensor in find_changed(model, before, new, _find_trained(model, optimizer, kinds)).items()
    }
    bases: dict[str, Tensor] = {}
    if tolerance:  # 0 forbids the rotated form, which cannot restore a weight bit for bit
        for group in optimizer.param_groups:
            if group.get("kind") is not None and group["basis"] is not None:
                _rotate_kind(group, named_tensors(model), before, entries, bases, tolerance)
    saved = summarize(Path(folder), entries, bases, kinds, optimizer)
    source, model_name = name_base(model, base), get_class_name(model)
    # Of the target weights that stayed; the entries hold those of the others.
    stayed = {
        name: {"shape": list(one.shape), "dtype": str(one.dtype), "sha256": digest(one)}
        for name, one in before.items()
        if name in kinds and name not in entries and name not in new and not is_quantized(one)
    }
    facts = {"base": source or model_name, "model": model_name, "tolerance": tolerance, "mlp": kinds, "stayed": stayed}
    write_adapter(Path(folder), facts, entries, bases)
    narrow = find_narrow([before[name] for name in kinds if name in before])
    write_card(Path(folder), source, model_name, str(saved), tolerance, narrow)
    return saved


def _find_kinds(model: nn.Module, optimizer: Any, names: Names | None) -> dict[str, str]:
    """Parameter name -> layer kind of the SparseGrad weights."""
    if optimizer is None:
        return {f"{name}.weight": kind for kind, found in _find_linears(model, names).items() for name in found}
    if names is not None:
        raise UserError(
            f"target_modules={names} and optimizer=: give one of them, since the optimizer knows its weights"
        )
    tensors = named_tensors(model)
    describe(optimizer)  # raises what is wrong with it
    groups = (group for group in optimizer.param_groups if group.get("kind"))
    kinds = {name: group["kind"] for group in groups for name in _list_names(tensors, group)}
    if unknown := set(kinds) - set(tensors):
        raise UserError(
            f"the optimizer trains {format_names(unknown)}, which the model does not have: give the model that was "
            "prepared, not wrapped; or leave out optimizer="
        )
    return kinds


def _find_trained(model: nn.Module, optimizer: Any, kinds: Mapping[str, str]) -> set[str]:
    """Names of the parameters that the optimizer trains; without it, of those that require a gradient."""
    if optimizer is None:
        return list_trainable(model)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own} | set(kinds)


def _find_linears(model: nn.Module, names: Names | None) -> Linears:
    """The linears of `names`; an error also says how to do without names."""
    try:
        return find_mlp(model, names)
    except UserError as error:
        raise UserError(f"{error}; or give optimizer=, what sparsegrad.prepare returned, which knows them") from None


def _list_names(tensors: Mapping[str, Tensor], group: Mapping[str, Any]) -> list[str]:
    """Names in the plain model of the weights of a group, which may be of that model compiled, or of one around it."""
    names = list_weights(group)
    plain = [name if name in tensors else name.replace("_orig_mod.", "") for name in names]
    own = {id(tensor): name for name, tensor in tensors.items()}  # without the cores of engine `fast`, once it is over
    pairs = zip(plain, group["params"], strict=True)
    return [name if name in tensors else own.get(id(weight), name) for name, weight in pairs]


def _make_entry(tensor: Tensor, before: Tensor | None, is_mlp: bool) -> Entry:
    """The entry of a tensor that differs from that of the base, or that the base does not have."""
    after = tensor.detach().cpu().contiguous().view(-1)
    if before is None:
        return Entry("whole", tuple(tensor.shape), tensor.dtype, None, after.clone())
    old = before.detach().cpu().contiguous()
    index = (as_integers(after) != as_integers(old.view(-1))).nonzero().flatten()
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
    if None in basis.shape:  # with one side rotated the change is not sparse enough to save anything
        return
    listed = [name for name in _list_names(tensors, group) if name in entries]
    found = {name: _rotate_change(basis, tensors[name], before[name], tolerance) for name in listed}
    cores = {name: core for name, core in found.items() if core is not None}
    if not cores:
        return
    cut, matrices = _cut(basis, list(cores.values()))
    rotated = {
        name: _make_rotated(core, entries[name], before[name], group["kind"])
        for name, core in zip(cores, cut, strict=True)
    }
    size = sum(matrix.nbytes for matrix in matrices) + sum(entry.size for entry in rotated.values())
    if size < sum(entries[name].size for name in cores):
        entries.update(rotated)
        bases.update({f"{group['kind']}.{part}": matrix for part, matrix in zip(BASIS_PARTS, matrices, strict=True)})


def _rotate_change(basis: Basis, after: Tensor, before: Tensor, tolerance: float) -> Tensor | None:
    """The rotated change (out, in) without its smallest entries; None if it would not give `after` within `tolerance`.

    What is stored and the merged weight are rounded, which a 16-bit dtype may make worse than the missing entries are.
    So the error is measured, and fewer entries are dropped where it is too large.
    """
    after, before = after.detach().cpu(), before.detach().cpu()
    difference = after.double() - before.double()
    change = basis.rotate(difference)
    energy, order = change.flatten().square().sort()  # the basis is orthogonal: the same norm as the change of W
    energy = energy.cumsum(0)
    limit = allowed = tolerance * float(difference.norm())
    for _ in range(_TRIES):
        core = change.clone()
        core.view(-1)[order[energy <= limit**2]] = 0
        error = _measure_error(basis, core, after, before)
        if error <= allowed:
            return core
        limit *= 0.99 * allowed / error
    return None


def _measure_error(basis: Basis, core: Tensor, after: Tensor, before: Tensor) -> float:
    """The norm of what is missing from the weight that a user merges."""
    (core,), (V, U) = _cut(basis, [core])
    return float((add_rotated(before, core.float(), V, U).double() - after.double()).norm())


def _cut(basis: Basis, cores: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """What is stored: the rows and columns (c, r) with a nonzero entry in any core, and their columns of V and U."""
    used = torch.stack([core != 0 for core in cores]).any(0)
    rows, columns = used.any(1), used.any(0)  # (out,) and (in,)
    U, V = basis.both()
    return [core[rows][:, columns] for core in cores], (V[:, rows].float(), U[:, columns].float())


def _make_rotated(core: Tensor, old: Entry, before: Tensor, kind: str) -> Entry:
    """The rotated form of an entry, from the part (c, r) of the rotated change that is stored."""
    flat = core.flatten()
    index = flat.nonzero().flatten().to(torch.int32)
    return Entry("rotated", old.shape, old.dtype, digest(before), flat[index.long()].float(), index, kind)
