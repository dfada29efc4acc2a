"""The files of an adapter: one safetensors, and the JSON that tells what is in it. Names of files are fixed.

Where a folder is saved again, the new tensors wait under a name of their sha256 until the JSON tells of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegrad.errors import UserError
from sparsegrad.files import unwritable, write_json
from sparsegrad.hashing import file_sha256, tensors_sha256

FORMAT = "sparsegrad-adapter-1"
TENSORS, FACTS = "sparsegrad_adapter.safetensors", "sparsegrad_adapter.json"
_WAITING = (
    "sparsegrad_adapter.{}.safetensors"  # of tensors that the JSON does not tell of yet; the name has their sha256
)
_SHA256 = re.compile("[0-9a-f]{64}")
BASIS_PARTS = ("out_basis", "in_basis")  # of each kind, only the columns that kept entries need
FORMS = ("whole", "sparse", "rotated")
_MAX_FACTS = 64 * 2**20  # bytes of JSON; a model of 100,000 tensors has a third of it
DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
# Of buffers that count.
DTYPES |= {str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}


@dataclass(frozen=True)
class Entry:
    """One changed tensor as stored.

    Attributes:
        form: see `sparsegrad.adapter.load`.
        shape, dtype: of the model's tensor.
        base_sha256: of the base's tensor, where the adapter was made against it; None for what is new, as a head.
        values: new values, flat; or kept entries of the rotated change.
        index: flat positions of `values`, or None for all.
        kind: layer kind whose basis rotates, of form rotated.
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
        """Bytes of its tensors."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)

    def resolve(self, base: Tensor, bases: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Positions (None: all) and new values for the tensor whose values are now `base`."""
        if self.form != "rotated":
            return None if self.index is None else self.index.long(), self.values
        V, U = (bases[f"{self.kind}.{part}"] for part in BASIS_PARTS)
        core = torch.zeros(V.shape[1] * U.shape[1], dtype=torch.float64)
        core[self.index.long()] = self.values.double()  # type: ignore[union-attr]
        change = V.double() @ core.view(V.shape[1], U.shape[1]) @ U.double().T
        merged = base.detach().cpu().double() + change
        return None, merged.to(self.dtype).view(-1)


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes of a tensor."""
    return tensors_sha256([(f"{tensor.dtype}{tuple(tensor.shape)}:", tensor)])


def write_adapter(
    folder: Path, facts: Mapping[str, Any], entries: Mapping[str, Entry], bases: Mapping[str, Tensor]
) -> int:
    """Write both files; whenever it ends, the folder holds the adapter of before or the new one, whole.

    The JSON decides which: it holds the sha256 of its tensors, which wait under another name until it is there.

    Returns:
        Bytes of the tensors' file.

    Raises:
        UserError: when the folder cannot be written.
    """
    tensors = {f"{name}::values": entry.values.contiguous() for name, entry in entries.items()}
    tensors |= {f"{name}::index": entry.index for name, entry in entries.items() if entry.index is not None}
    tensors |= {f"{name}::basis": tensor.contiguous() for name, tensor in bases.items()}
    listed = {name: _facts(entry) for name, entry in entries.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        waiting, sha256 = _write_waiting(folder, tensors)
        size = waiting.stat().st_size
        try:
            write_json(folder / FACTS, {"format": FORMAT, **facts, "sha256": sha256, "tensors": listed})
        except UserError:
            waiting.unlink()
            raise
        waiting.replace(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder / TENSORS, error) from None
    return size


def _settle(folder: Path) -> None:
    """Finish what a save that was killed left: the tensors that the JSON tells of get their name, others go."""
    try:
        current = _WAITING.format(_read_facts(folder / FACTS)["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        current = None  # no adapter, or none that can be read
    for path in folder.glob(_WAITING.format("*")):
        if path.name == current:
            path.replace(folder / TENSORS)
        elif _SHA256.fullmatch(path.name.split(".")[1]):
            path.unlink()


def _write_waiting(folder: Path, tensors: dict[str, Tensor]) -> tuple[Path, str]:
    """The tensors under the name of their sha256, on the disk before the JSON can tell of them."""
    scratch = folder / f".{TENSORS}.{os.getpid()}.tmp"
    try:
        save_file(tensors, scratch, {"format": FORMAT})
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        sha256 = file_sha256(scratch)
        return scratch.replace(folder / _WAITING.format(sha256)), sha256
    finally:
        scratch.unlink(missing_ok=True)


def _tensors_path(folder: Path, sha256: Any) -> Path:
    """Where the tensors lie; a value that is no sha256 names no file, so that no JSON leads out of the folder."""
    waiting = folder / _WAITING.format(sha256)
    return waiting if _SHA256.fullmatch(str(sha256)) and waiting.is_file() else folder / TENSORS


def _facts(entry: Entry) -> dict[str, Any]:
    plain = {"form": entry.form, "shape": list(entry.shape), "dtype": str(entry.dtype), "kind": entry.kind}
    return {**plain, "base_sha256": entry.base_sha256}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, Tensor]]:
    """The facts, the entries by name, and the parts of the bases; everything that does not need a model is checked.

    Raises:
        UserError: for files that are missing, damaged, of another version, inconsistent or not finite.
    """
    path = folder / FACTS
    try:
        facts = _read_facts(path)
        stored = _tensors_path(folder, facts["sha256"])
        if not _is_as_written(stored, facts["sha256"]):
            raise UserError(f"{stored} is damaged or of another adapter (its sha256 differs): copy it anew")
        tensors = load_file(stored)
        entries = {name: _entry(name, plain, tensors) for name, plain in facts["tensors"].items()}
        bases = {key.removesuffix("::basis"): tensors.pop(key) for key in list(tensors) if key.endswith("::basis")}
        if tensors:
            raise UserError(f"{stored} holds {len(tensors)} tensors that {FACTS} does not name: copy it anew")
        _check_rotated(entries, bases)
    except FileNotFoundError as error:
        raise UserError(
            f"no adapter in {folder}: {error.filename or FACTS} is missing; name a folder of save_adapter"
        ) from None
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(f"{folder} is not a readable adapter ({type(error).__name__}: {error}): save it anew") from None
    return facts, entries, bases


def _read_facts(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_FACTS:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than any adapter's: name another folder")
    facts: dict[str, Any] = json.loads(path.read_text())
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} has format {facts.get('format')}, not {FORMAT}: save it with this version")
    return facts


def _entry(name: str, plain: Mapping[str, Any], tensors: dict[str, Tensor]) -> Entry:
    """Take one entry's tensors out of `tensors` and check them against what the JSON says."""
    shape, dtype = tuple(int(size) for size in plain["shape"]), DTYPES[plain["dtype"]]
    values, index = tensors.pop(f"{name}::values"), tensors.pop(f"{name}::index", None)
    entry = Entry(plain["form"], shape, dtype, plain["base_sha256"], values, index, plain["kind"])
    expected = torch.float32 if entry.form == "rotated" else dtype
    if entry.form not in FORMS or (entry.form == "whole") != (index is None) or values.dtype != expected:
        raise UserError(f"the adapter's {name} is inconsistent (form {entry.form}, {values.dtype}): save it anew")
    size = torch.Size(shape).numel()
    wanted = (size,) if index is None else tuple(index.shape)
    if tuple(values.shape) != wanted or (index is not None and not _is_index(index, size)):
        raise UserError(f"the adapter's {name} has positions or values that do not fit {shape}: save it anew")
    if not torch.isfinite(values).all():
        raise UserError(f"the adapter's {name} holds values that are not finite: save one that was trained well")
    return entry


def _is_index(index: Tensor, size: int) -> bool:
    """Whole numbers, rising, within the tensor."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        return False
    return not len(index) or bool(index[0] >= 0 and index[-1] < size and (index.diff() > 0).all())


def _check_rotated(entries: Mapping[str, Entry], bases: Mapping[str, Tensor]) -> None:
    for name, entry in entries.items():
        if entry.form != "rotated":
            continue
        V, U = (bases[f"{entry.kind}.{part}"] for part in BASIS_PARTS)
        fits = V.dim() == U.dim() == 2 and (V.shape[0], U.shape[0]) == entry.shape
        # Columns of square matrices: more would make a small file ask for a large product.
        fits = fits and V.shape[1] <= V.shape[0] and U.shape[1] <= U.shape[0] and V.dtype == U.dtype == torch.float32
        inside = (
            fits and entry.index is not None and (not len(entry.index) or entry.index[-1] < V.shape[1] * U.shape[1])
        )
        if not fits or not inside or not all(torch.isfinite(matrix).all() for matrix in (V, U)):
            raise UserError(f"the adapter's basis of kind {entry.kind} does not fit {name}: save it anew")


def _is_as_written(path: Path, sha256: Any) -> bool:
    path.stat()  # names the file that is missing
    try:
        with safe_open(path, framework="pt"):
            pass  # its header fits its size: only then is all of it read
    except SafetensorError:
        return False
    return bool(file_sha256(path) == sha256)
