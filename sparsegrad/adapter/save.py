"""Save an adapter: find what differs from the base, choose the smallest form of each tensor, write a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.adapter.card import write_card
from sparsegrad.adapter.format import BASIS_PARTS, DTYPES, Entry, digest, write_adapter
from sparsegrad.adapter.load import named_tensors
from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, check_number, first_line, renamed_arguments
from sparsegrad.layers.replace import refuse_layers
from sparsegrad.optim.summary import describe
from sparsegrad.targets import Names, find_mlp

Base = nn.Module | Mapping[str, Tensor] | str | Path
_SMALL = 2**16  # entries; below it a tensor is stored whole: a head is new, and no base has it
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # bits of a number of so many bytes


@dataclass(frozen=True)
class Saved:
    """What `save_adapter` wrote, in bytes; `print(saved)` says it in a line.

    Attributes:
        folder: where it lies.
        forms: number of tensors of each form.
        mlp_bytes: of the SparseGrad weights, with their bases where they are rotated.
        rest_bytes: of all other changed tensors, which peft's adapters would hold as `modules_to_save`.
        lora_bytes: of LoRA matrices on the same weights with as many trainable numbers; None without `optimizer`.
    """

    folder: Path
    forms: dict[str, int]
    mlp_bytes: int
    rest_bytes: int
    lora_bytes: int | None

    def __str__(self) -> str:
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items() if count)
        lora = "" if self.lora_bytes is None else f" (LoRA of the same count: {_readable(self.lora_bytes)})"
        return f"MLP weights {_readable(self.mlp_bytes)}{lora}, the rest {_readable(self.rest_bytes)}; tensors: {forms}"


@renamed_arguments(quiet=True, mlp="target_modules")
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
        model: the trained model, of ordinary linears (after engine `fast` or `layer` call `to_linears` first), not
            wrapped by DDP or the like; torch.compile's is as good.
        folder: created; an adapter that lies there is replaced, but a README.md that somebody wrote or edited stays.
        base: what the model was before: a hub id or folder, which is loaded once more for the comparison; a model; or
            tensors by name, of which those of a new head may be missing. None: the name that `from_pretrained` left in
            the model's configuration, as in `peft`.
        optimizer: what `prepare` returned; tells which weights are SparseGrad, their bases and counts. None: those
            of `target_modules`.
        tolerance: 0 stores the model bit for bit. Above, an MLP weight's change may be stored as kept entries of the
            rotated space that miss at most this share of it (Frobenius norm), where that is smaller; needs `optimizer`.
        target_modules: without `optimizer`, which weights are SparseGrad, as given to `prepare`; None: those of a
            known layout. `mlp=` is an alias.

    Raises:
        UserError: for a base that cannot be had, has other tensors or lacks SparseGrad weights, a model that differs
            nowhere, weights that are not finite or of a dtype that is not stored, or a folder that cannot be written.
    """
    check_number("tolerance", tolerance, at_least=0, below=1)
    model = _uncompiled(model)
    _check_plain(model)
    if tolerance and optimizer is None:
        raise UserError(f"tolerance={tolerance} needs the bases: give optimizer=, what sparsegrad.prepare returned")
    kinds = _mlp_kinds(model, optimizer, target_modules)
    source, before, new = _base(model, base, kinds)
    entries = _changed(named_tensors(model), before, new, kinds)
    if not entries:
        raise UserError("the model equals its base in every weight: train it first, or name the base it came from")
    bases: dict[str, Tensor] = {}
    if tolerance:
        for group in optimizer.param_groups:
            if group.get("kind") is not None and group["basis"] is not None:
                _rotate_kind(group, named_tensors(model), before, entries, bases, tolerance)
    saved = _summary(Path(folder), entries, bases, kinds, optimizer)
    facts = {"base": source, "model": type(model).__name__, "tolerance": tolerance, "mlp": kinds}
    write_adapter(Path(folder), facts, entries, bases)
    write_card(Path(folder), source, type(model).__name__, str(saved), tolerance)
    return saved


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given; it shares every weight."""
    return getattr(model, "_orig_mod", model)


def _check_plain(model: nn.Module) -> None:
    """Refuse what DDP, DataParallel or another engine made of a model: the names in it are not the base's."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"the model is wrapped by {type(model).__name__}: save the plain one, model.module")
    refuse_layers(model)


def _mlp_kinds(model: nn.Module, optimizer: Any, names: Names | None) -> dict[str, str]:
    """Parameter name -> layer kind of the SparseGrad weights."""
    if optimizer is None:
        return {f"{name}.weight": kind for kind, found in find_mlp(model, names).items() for name in found}
    if names is not None:
        raise UserError(f"target_modules={names} and optimizer=: give one of them, as the optimizer knows its weights")
    tensors = named_tensors(model)
    kinds = {_name_in(tensors, name): group.kind for group in describe(optimizer).taken for name in group.names}
    if unknown := set(kinds) - set(tensors):
        raise UserError(
            f"the optimizer trains {_some(unknown)}, which the model has not: give the model that was prepared, "
            "not wrapped; or leave out optimizer="
        )
    return kinds


def _name_in(tensors: Mapping[str, Tensor], name: str) -> str:
    """The plain name of what was prepared when it was compiled, where the model has that one alone."""
    return name if name in tensors else name.replace("_orig_mod.", "")


def _base(model: nn.Module, base: Base | None, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    """Name for the records, tensors by name, and names that are new in the model."""
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base is None or base == "":
        raise UserError("base=None: the model does not know where it came from; give base=, its hub id or a copy of it")
    if isinstance(base, str | Path):
        return _loaded_base(model, str(base), mlp)
    names = set(named_tensors(model))
    if isinstance(base, nn.Module):
        tensors = named_tensors(_uncompiled(base))
        if unknown := names ^ set(tensors):
            raise UserError(
                f"model and base differ in the tensors {_some(unknown)}: give the plain model and its own base"
            )
        return type(model).__name__, tensors, set()
    if lacking := [name for name in mlp if name not in base]:
        raise UserError(
            f"base= has no tensor {lacking[0]}, a SparseGrad weight of the model, but {_some(set(base)) or 'nothing'}: "
            "give tensors by the names of the plain model, as a copy of its state_dict() from before training has them"
        )
    return type(model).__name__, dict(base), names - set(base)


def _loaded_base(model: nn.Module, source: str, mlp: Mapping[str, str]) -> tuple[str, dict[str, Tensor], set[str]]:
    load = getattr(type(model), "from_pretrained", None)
    if load is None:
        raise UserError(
            f"base={source} cannot be loaded for a {type(model).__name__}: give a copy of the model instead"
        )
    try:
        with torch.random.fork_rng():  # a new head is drawn; the caller's numbers stay as they are
            dtype = next(model.parameters()).dtype
            loaded, info = load(source, config=getattr(model, "config", None), dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"base={source} cannot be loaded ({first_line(error)}): give base= as a folder or a copy of it"
        ) from None
    tensors, new = named_tensors(loaded), set(info["missing_keys"])
    drawn = set(mlp) if new.issuperset(mlp) else set()  # another architecture's files: every weight is drawn anew
    if unknown := drawn | set(named_tensors(model)) - set(tensors):
        raise UserError(f"base={source} has not {_some(unknown)} of the model: name the base that it came from")
    name = Path(source).name if Path(source).exists() else source  # a folder's place is nobody's business
    return name, tensors, new


def _changed(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], new: set[str], mlp: Mapping[str, str]
) -> dict[str, Entry]:
    """Entries of all tensors that differ from the base, bit by bit."""
    entries = {}
    for name, tensor in tensors.items():
        old = None if name in new else before[name]
        if old is not None and (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{name} is {tuple(old.shape)} {old.dtype} in the base and not so in the model: give its own"
            )
        if old is not None and torch.equal(_bytes(old), _bytes(tensor)):
            continue
        _check_storable(name, tensor)
        entries[name] = _entry(tensor, old, name in mlp)
    return entries


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes, on the CPU; torch compares numbers of one byte whatever dtype they make up."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _check_storable(name: str, tensor: Tensor) -> None:
    if str(tensor.dtype) not in DTYPES:
        raise UserError(
            f"{name} is {tensor.dtype}, which an adapter cannot hold; it holds {', '.join(DTYPES)}: convert it in the "
            "model and its base, or register the buffer with persistent=False"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} is not finite: this training went wrong; go back to an earlier checkpoint")


def _entry(tensor: Tensor, before: Tensor | None, is_mlp: bool) -> Entry:
    """The entry of a tensor that differs from the base's, or that the base lacks."""
    after = tensor.detach().cpu().contiguous().view(-1)
    if before is None:
        return Entry("whole", tuple(tensor.shape), tensor.dtype, None, after.clone())
    old = before.detach().cpu().contiguous()
    bits = _INTEGERS[after.element_size()]
    index = (after.view(bits) != old.view(-1).view(bits)).nonzero().flatten()
    return _smallest(after, old, index, is_mlp)


def _smallest(after: Tensor, before: Tensor, index: Tensor, is_mlp: bool) -> Entry:
    """Sparse where that saves bytes, else whole; `after` is flat, `before` has the shape."""
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
    """Replace the entries of one kind by their rotated form, if with its basis that is smaller."""
    basis: Basis = group["basis"].to("cpu", torch.float64)
    U, V = basis.in_basis, basis.out_basis
    if U is None or V is None:  # one side rotated: the change is not sparse enough to gain
        return
    names = [name for name in (_name_in(tensors, own) for own in group["param_names"]) if name in entries]
    cores = {name: _core(basis, tensors[name], before[name], tolerance) for name in names}
    used = torch.stack([core != 0 for core in cores.values()]).any(0) if cores else torch.zeros(1, 1)
    rows, columns = used.any(1), used.any(0)
    rotated = {}
    for name, core in cores.items():
        flat = core[rows][:, columns].flatten()
        index = flat.nonzero().flatten().to(torch.int32)
        old, kind = entries[name], group["kind"]
        values = flat[index.long()].float()
        rotated[name] = Entry("rotated", old.shape, old.dtype, digest(before[name]), values, index, kind)
    matrices = (V[:, rows].float(), U[:, columns].float())
    size = sum(matrix.nbytes for matrix in matrices) + sum(entry.size for entry in rotated.values())
    if cores and size < sum(entries[name].size for name in names):
        entries.update(rotated)
        bases.update({f"{group['kind']}.{part}": matrix for part, matrix in zip(BASIS_PARTS, matrices, strict=True)})


def _core(basis: Basis, after: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """The rotated change (out, in) with its smallest entries, together at most `tolerance` of its norm, set to 0."""
    core = basis.rotate(after.detach().cpu().double() - before.detach().cpu().double())
    energy, order = core.flatten().square().sort()
    dropped = order[energy.cumsum(0) <= tolerance**2 * energy.sum()]
    core.view(-1)[dropped] = 0
    return core


def _summary(
    folder: Path, entries: Mapping[str, Entry], bases: Mapping[str, Tensor], mlp: Mapping[str, str], optimizer: Any
) -> Saved:
    forms: dict[str, int] = {}
    for entry in entries.values():
        forms[entry.form] = forms.get(entry.form, 0) + 1
    of_mlp = sum(entry.size for name, entry in entries.items() if name in mlp)
    rest = sum(entry.size for name, entry in entries.items() if name not in mlp)
    basis = sum(tensor.nbytes for tensor in bases.values())
    return Saved(folder, forms, of_mlp + basis, rest, None if optimizer is None else _lora_bytes(optimizer))


def _lora_bytes(optimizer: Any) -> int:
    """Of LoRA in float32, peft's default, with the rank whose count is next to the kept entries."""
    return sum(
        4 * len(group.names) * sum(group.shape) * max(1, round(group.kept / sum(group.shape)))
        for group in describe(optimizer).taken
    )


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _readable(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
