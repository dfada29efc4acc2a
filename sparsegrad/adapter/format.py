"""The files of an adapter: one safetensors file, and a JSON file that describes it. File names are fixed.

Saving must not damage an existing adapter. So new tensors are first stored under a temporary name that contains their
sha256. Replacing the JSON, which holds the sha256 of its tensors, is the atomic switch from the old adapter to the new.
One process saves at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparsegrad.adapter.folder_lock import Files, saving
from sparsegrad.adapter.lora_files import CONFIG
from sparsegrad.errors import UserError
from sparsegrad.files import flush, load_json, save_tensors, unreadable, write_json
from sparsegrad.hashing import file_sha256, tensors_sha256

FORMAT = "sparsegrad-adapter-1"
TENSORS, FACTS = "sparsegrad_adapter.safetensors", "sparsegrad_adapter.json"
_WAITING = "sparsegrad_adapter.{}.safetensors"  # tensors of a save in progress; the name contains their sha256
_SCRATCH = ".sparsegrad_adapter.*.saving"  # folder of a save in progress, with the process id
# What a killed save leaves beside it; tensors are from an earlier version.
_DEAD = (".sparsegrad_adapter.json.*.tmp", ".sparsegrad_adapter.safetensors.*.tmp", _WAITING.format("[0-9a-f]" * 64))
_SHA256 = re.compile("[0-9a-f]{64}")
BASIS_PARTS = ("out_basis", "in_basis")  # stored per kind, only the columns that its kept entries need
FORMS = ("whole", "sparse", "rotated")
DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
HALVES = (torch.bfloat16, torch.float16)
# Buffers that hold counts.
DTYPES |= {str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}


@dataclass(frozen=True)
class Entry:
    """One changed tensor as stored.

    Attributes:
        form: `whole`, `sparse` or `rotated`; see `sparsegrad.adapter.merge`.
        shape, dtype: shape and dtype of the model's tensor.
        base_sha256: hash of the tensor that the base must have; None if any is accepted, as for a new head.
        values: new values (n,); or, of form `rotated`, kept entries (n,) of the rotated change.
        index: flat positions (n,) of `values`; None if they are all entries.
        kind: layer kind whose basis rotates the change; only of form `rotated`.
    """

    form: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base_sha256: str | None
    values: Tensor
    index: Tensor | None = None
    kind: str | None = None

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)

    def resolve(self, base: Tensor, bases: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Flat positions (None: all) and new values for a tensor that now has the values `base` (out, in)."""
        if self.form != "rotated":
            return None if self.index is None else self.index.long(), self.values
        V, U = (bases[f"{self.kind}.{part}"] for part in BASIS_PARTS)  # (out, c) and (in, r)
        core = torch.zeros(V.shape[1] * U.shape[1], dtype=torch.float64, device=V.device)
        core[self.index.long()] = self.values.double()  # type: ignore[union-attr]
        return None, add_rotated(base, core.view(V.shape[1], U.shape[1]), V, U).view(-1)


def add_rotated(base: Tensor, core: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """The merged weight W + V S U^T (out, in) on the CPU, for a change S (c, r): in float64, then of the dtype of W."""
    change = V.double() @ core.double() @ U.double().T
    return (base.detach().cpu().double() + change).to(base.dtype)


def digest(tensor: Tensor) -> str:
    """Hex SHA-256 of dtype, shape and bytes of a tensor."""
    return tensors_sha256([(f"{tensor.dtype}{tuple(tensor.shape)}:", tensor)])


def write_adapter(
    folder: Path, facts: Mapping[str, Any], entries: Mapping[str, Entry], bases: Mapping[str, Tensor]
) -> int:
    """Write both files. If the process is killed at any point, the folder holds the old or the new adapter, complete.

    Args:
        folder: created if needed.
        facts: what the JSON holds beside the entries.
        entries: tensor name -> entry.
        bases: `kind.part` -> columns of a basis.

    Returns:
        Size of the tensors' file in bytes.

    Raises:
        UserError: when the folder cannot be written, or the JSON of an interrupted save cannot be read now.
    """
    tensors = {f"{name}::values": entry.values.contiguous() for name, entry in entries.items()}
    tensors |= {f"{name}::index": entry.index for name, entry in entries.items() if entry.index is not None}
    tensors |= {f"{name}::basis": tensor.contiguous() for name, tensor in bases.items()}
    listed = {name: _describe_entry(entry) for name, entry in entries.items()}
    with saving(folder, ADAPTER) as scratch:
        stored = scratch / TENSORS  # in a folder: safetensors itself writes another file beside it first
        save_tensors(tensors, stored, {"format": FORMAT})
        flush(stored)  # to disk before the JSON can refer to them
        size, sha256 = stored.stat().st_size, file_sha256(stored)
        write_json(scratch / FACTS, {"format": FORMAT, **facts, "sha256": sha256, "tensors": listed})
        _exchange(folder, scratch, sha256)
    return size


def _exchange(folder: Path, scratch: Path, sha256: str) -> None:
    """Replace the adapter by the one in `scratch`: three renames, each of which fails if `scratch` was deleted."""
    waiting = folder / _WAITING.format(sha256)
    try:
        (scratch / TENSORS).replace(waiting)
        # From here on the new adapter is valid: `tensors_path` finds its tensors under either name.
        (scratch / FACTS).replace(folder / FACTS)
        waiting.replace(folder / TENSORS)
    finally:
        _settle(folder)  # renames the tensors if the JSON refers to them
        waiting.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Complete a save that was interrupted: rename the tensors that the JSON refers to."""
    if not any(folder.glob(_WAITING.format("*"))):
        return
    try:
        current = _WAITING.format(_read_facts(folder / FACTS)["sha256"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # no adapter, or a damaged one
    except OSError as error:  # as for a moment on a network file system: the adapter may be valid
        raise unreadable(folder / FACTS, error) from None
    for path in folder.glob(_WAITING.format("*")):
        if path.name == current:
            path.replace(folder / TENSORS)


ADAPTER = Files(FACTS, TENSORS, _SCRATCH, _DEAD, _settle)


def tensors_path(folder: Path, sha256: Any) -> Path:
    """Path of the tensors; only a valid sha256 is used in a name, so that no JSON can point out of the folder."""
    waiting = folder / _WAITING.format(sha256)
    return waiting if _SHA256.fullmatch(str(sha256)) and waiting.is_file() else folder / TENSORS


def _describe_entry(entry: Entry) -> dict[str, Any]:
    plain = {"form": entry.form, "shape": list(entry.shape), "dtype": str(entry.dtype), "kind": entry.kind}
    return {**plain, "base_sha256": entry.base_sha256}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, Tensor]]:
    """The facts, the entries by name, and the parts of the bases, after all checks that do not need a model.

    Raises:
        UserError: for files that are missing, unreadable, damaged, of another version or inconsistent, or hold values
            that are not finite.
    """
    with _explained_errors(folder):
        facts = _read_facts(folder / FACTS)
        stored = tensors_path(folder, facts["sha256"])
        if not _is_as_written(stored, facts["sha256"]):
            raise UserError(f"{stored} is damaged or belongs to another adapter (its sha256 differs): copy it again")
        tensors = load_file(stored)
        entries = {name: _read_entry(name, plain, tensors) for name, plain in facts["tensors"].items()}
        bases = {key.removesuffix("::basis"): tensors.pop(key) for key in list(tensors) if key.endswith("::basis")}
        if tensors:
            raise UserError(f"{stored} holds {len(tensors)} tensors that {FACTS} does not name: copy it again")
        _check_rotated(entries, bases)
    return facts, entries, bases


@contextmanager
def _explained_errors(folder: Path) -> Iterator[None]:
    """Within: a file that is missing, cannot be read or is damaged becomes an error for the user."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no adapter in {folder}: {_explain_missing(folder, error.filename or FACTS)}") from None
    except UserError:
        raise
    except OSError as error:  # says nothing about the file's content
        raise unreadable(error.filename or folder, error) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{folder} is not a readable adapter ({type(error).__name__}: {error}): save it again"
        ) from None


def _explain_missing(folder: Path, missing: str) -> str:
    """What is in place of an adapter, and what to do with it."""
    if folder.is_file():
        return "it is a file; name the folder"
    if not folder.is_dir():
        return "there is no such folder; name a folder of save_adapter, or a repository on the hub as org/name"
    if not (folder / FACTS).is_file():
        if (folder / CONFIG).is_file():
            return "this is a peft adapter: load it with peft.PeftModel.from_pretrained(model, folder)"
        if (folder / "config.json").is_file():
            return "this is a whole model: load it with from_pretrained, or name a folder of save_adapter"
    return f"{missing} is missing; name a folder of save_adapter"


def _read_facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = load_json(path)
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} has format {facts.get('format')}, not {FORMAT}: save it with this version")
    return facts


def _read_entry(name: str, plain: Mapping[str, Any], tensors: dict[str, Tensor]) -> Entry:
    """Remove one entry's tensors from `tensors` and check them against what the JSON says."""
    shape, dtype = tuple(int(size) for size in plain["shape"]), DTYPES[plain["dtype"]]
    values, index = tensors.pop(f"{name}::values"), tensors.pop(f"{name}::index", None)
    entry = Entry(plain["form"], shape, dtype, plain["base_sha256"], values, index, plain["kind"])
    expected = torch.float32 if entry.form == "rotated" else dtype
    if entry.form not in FORMS or (entry.form == "whole") != (index is None) or values.dtype != expected:
        raise UserError(f"the adapter's {name} is inconsistent (form {entry.form}, {values.dtype}): save it again")
    size = torch.Size(shape).numel()
    wanted = (size,) if index is None else tuple(index.shape)
    if tuple(values.shape) != wanted or (index is not None and not _is_index(index, size)):
        raise UserError(f"the adapter's {name} has positions or values that do not fit {shape}: save it again")
    if not torch.isfinite(values).all():
        raise UserError(f"the adapter's {name} holds values that are not finite: save a model whose weights are finite")
    return entry


def _is_index(index: Tensor, size: int) -> bool:
    """Whether `index` holds increasing positions within a tensor of `size` entries."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        return False
    return not len(index) or bool(index[0] >= 0 and index[-1] < size and (index.diff() > 0).all())


def _check_rotated(entries: Mapping[str, Entry], bases: Mapping[str, Tensor]) -> None:
    """Check that the stored columns of each basis fit the shapes and positions of the rotated entries."""
    for name, entry in entries.items():
        if entry.form != "rotated":
            continue
        V, U = (bases[f"{entry.kind}.{part}"] for part in BASIS_PARTS)  # (out, c) and (in, r)
        fits = V.dim() == U.dim() == 2 and (V.shape[0], U.shape[0]) == entry.shape
        # A basis has no more columns than rows. Without this check a small file could require a huge product.
        fits = fits and V.shape[1] <= V.shape[0] and U.shape[1] <= U.shape[0] and V.dtype == U.dtype == torch.float32
        inside = (
            fits and entry.index is not None and (not len(entry.index) or entry.index[-1] < V.shape[1] * U.shape[1])
        )
        if not fits or not inside or not all(torch.isfinite(matrix).all() for matrix in (V, U)):
            raise UserError(f"the adapter's basis of kind {entry.kind} does not fit {name}: save it again")


def _is_as_written(path: Path, sha256: Any) -> bool:
    """Whether a file of tensors has the sha256 that the JSON states; `FileNotFoundError` if it is missing."""
    with path.open("rb"):  # because safetensors calls every file missing that it cannot open
        pass
    try:
        with safe_open(path, framework="pt"):
            pass  # checks the header against the file size, before the whole file is read for its hash
    except SafetensorError:
        return False
    return bool(file_sha256(path) == sha256)
