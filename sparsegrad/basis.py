"""The change of basis of one layer kind (paper, section 3.1 and Table 2), and its file format.

`sparsegrad.calibration.grams` computes the matrices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegrad.arguments import explained, show
from sparsegrad.errors import UserError, check_choice
from sparsegrad.files import save_tensors, unreadable, write_with
from sparsegrad.hashing import tensors_sha256
from sparsegrad.precision import without_autocast
from sparsegrad.sparse_product import is_dense_faster, multiply_sparse

FORMAT = "sparsegrad-basis-1"
SIDES = ("both", "in", "out", "small")


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """Orthogonal matrices whose columns are singular vectors by decreasing energy, for both sides or for one.

    A side that is None is not rotated. Rotating only the smaller side costs about a sixth of rotating both (weights of
    4 to 1, as in BERT; a fifth in LLaMA) and keeps most of the concentration, but it is not the paper's method, which
    rotates both.

    Attributes:
        in_basis: U (in, in), the paper's U^T; or None.
        out_basis: V (out, out), the paper's V^T; or None.

    Raises:
        UserError: when a matrix is no tensor or not square, or both are None. Orthogonality is not checked, as that
            costs O(n^3): the caller guarantees it.
    """

    in_basis: Tensor | None
    out_basis: Tensor | None

    def __post_init__(self) -> None:
        if self.in_basis is None and self.out_basis is None:
            raise UserError("a basis of no side rotates nothing: give in_basis, out_basis or both")
        for name, matrix in (("in_basis", self.in_basis), ("out_basis", self.out_basis)):
            if not isinstance(matrix, Tensor | None):
                raise UserError(f"{name} is a {type(matrix).__name__}: give a square matrix as a tensor, or None")
            if matrix is not None and (matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]):
                raise UserError(f"{name} of shape {tuple(matrix.shape)} is not a basis: give a square matrix")

    def __repr__(self) -> str:
        """Shape and dtype, since an optimizer's repr has one basis for each group."""
        return f"Basis({self.shape}, {self.dtype})"

    @classmethod
    def identity(cls, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Basis:
        """The basis that rotates nothing; with it SparseGrad is MeProp with masked Adam."""
        return cls(torch.eye(in_features, dtype=dtype), torch.eye(out_features, dtype=dtype))

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in): the shape of the weights that this basis rotates; None for a side that it does not rotate."""
        U, V = self.in_basis, self.out_basis
        return None if V is None else len(V), None if U is None else len(U)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return next(matrix.dtype for matrix in (self.in_basis, self.out_basis) if matrix is not None)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this basis can rotate weights of `shape` (out, in)."""
        return all(own in (None, given) for own, given in zip(self.shape, shape, strict=True))

    def only(self, sides: str) -> Basis:
        """The part for `sides`: `both`, `in`, `out`, or `small`, the side with fewer features.

        Raises:
            UserError: for a side that this basis does not have.
        """
        check_choice("sides", sides, SIDES)
        if sides == "small":
            sides = small_side(self.shape)
        # A side that is missing here stays None in the part: the count of Nones below detects it.
        part = Basis(None if sides == "out" else self.in_basis, None if sides == "in" else self.out_basis)
        if part.shape.count(None) > (sides != "both"):
            raise UserError(
                f"a basis for {self.shape} does not have sides={sides}: name the side it has, or calibrate again"
            )
        return part

    def both(self) -> tuple[Tensor, Tensor]:
        """U (in, in) and V (out, out).

        Raises:
            UserError: for a basis of one side.
        """
        if self.in_basis is None or self.out_basis is None:
            raise UserError(f"a basis for {self.shape} lacks a side: calibrate it with sides=both")
        return self.in_basis, self.out_basis

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Basis:
        """Move or cast, as `Tensor.to` does."""
        U, V = self.in_basis, self.out_basis
        return Basis(None if U is None else U.to(device, dtype), None if V is None else V.to(device, dtype))

    def by_columns(self) -> Basis:
        """The same matrices with contiguous columns, which is what a sparse product reads.

        Files store rows contiguously. With that layout `unrotate_sparse` takes ten times as long (3072 x 768, CPU).
        """
        U, V = self.in_basis, self.out_basis
        return Basis(None if U is None else U.T.contiguous().T, None if V is None else V.T.contiguous().T)

    @without_autocast
    def rotate(self, matrix: Tensor) -> Tensor:
        """V^T G U for G (..., out, in): a weight or gradient in the rotated space (Table 2, Grad Weights).

        Raises:
            UserError: for a matrix of another shape.
        """
        self._check_shape(matrix)
        if self.in_basis is not None:
            matrix = matrix @ self.in_basis  # (..., out, in)
        return matrix if self.out_basis is None else self.out_basis.T @ matrix

    @without_autocast
    def unrotate(self, matrix: Tensor) -> Tensor:
        """V G~ U^T for G~ (..., out, in): the inverse of `rotate`.

        Raises:
            UserError: for a matrix of another shape.
        """
        self._check_shape(matrix)
        if self.in_basis is not None:
            matrix = matrix @ self.in_basis.T
        return matrix if self.out_basis is None else self.out_basis @ matrix

    @without_autocast
    def unrotate_sparse(self, index: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        """V S U^T (count, out, in) for `count` sparse matrices S of `shape` (out, in).

        The longer side is one sparse-dense product for all matrices, O(k n) each; the other side is dense. With many
        entries both products are dense (`is_dense_faster`).

        Args:
            index: flat positions (count, k) of the nonzero entries of each S.
            values: the entries (count, k).
            shape: (out, in).
        """
        out_features, in_features = shape
        if is_dense_faster(values, out_features * in_features):
            whole = values.new_zeros(len(values), out_features * in_features).scatter_(1, index, values)
            return self.unrotate(whole.view(len(values), *shape))
        rows, columns = index // in_features, index % in_features  # (count, k) each
        if self.in_basis is None or (self.out_basis is not None and out_features >= in_features):
            # V S = (S^T V^T)^T: the sparse factor has to be on the left.
            half = multiply_sparse(columns, rows, values, in_features, self.out_basis.T)  # type: ignore[union-attr]
            half = half.transpose(1, 2)  # V S (count, out, in)
            return half if self.in_basis is None else half @ self.in_basis.T
        half = multiply_sparse(rows, columns, values, out_features, self.in_basis.T)  # S U^T (count, out, in)
        return half if self.out_basis is None else self.out_basis @ half

    def save(self, path: str | os.PathLike[str], fingerprint: str = "") -> None:
        """Write a safetensors file atomically; `fingerprint` identifies what the basis was made from."""
        save_bases(path, {"basis": self}, fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read what `save` wrote.

        Raises:
            UserError: when the file is missing, damaged, or does not hold one basis.
        """
        bases = load_bases(path)
        if len(bases) != 1:
            raise UserError(f"{path} holds the bases of {', '.join(bases)}: read it with load_bases")
        return next(iter(bases.values()))

    def _check_shape(self, matrix: Tensor) -> None:
        if not self.fits(matrix.shape[-2:]):
            raise UserError(f"a matrix {tuple(matrix.shape)} does not fit a basis for {self.shape}: give (out, in)")


def small_side(shape: Sequence[int | None]) -> str:
    """The side of (out, in) with fewer features; `in` if they are equal. A side that is None is not an option."""
    out_features, in_features = shape
    if out_features is None or in_features is None:
        return "out" if in_features is None else "in"
    return "out" if out_features < in_features else "in"


@explained()
def save_bases(path: str | os.PathLike[str], bases: Mapping[str, Basis], fingerprint: str = "") -> None:
    """Write the bases of several layer kinds to one safetensors file, atomically.

    Args:
        path: the file; its folder is created.
        bases: layer kind -> basis.
        fingerprint: identifies what the bases were made from; see `load_bases`.

    Raises:
        UserError: for what is no mapping from names to bases.
        ResourceError: when the file cannot be written; an earlier one is unchanged.
    """
    if not isinstance(bases, Mapping) or not all(isinstance(kind, str) for kind in bases):
        raise UserError(f"bases is {show(bases)}: give {{name of a layer kind: Basis}}, as optimizer.bases")
    tensors: dict[str, Tensor] = {}
    for kind, basis in bases.items():
        for side in ("in_basis", "out_basis"):
            if (matrix := getattr(basis, side)) is not None:
                tensors[f"{kind}.{side}"] = matrix.contiguous()  # safetensors refuses other strides
    _separate(tensors)
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "kinds": json.dumps(list(bases))}
    metadata["sha256"] = _hash_tensors(tensors)
    write_with(Path(path), lambda scratch: save_tensors(tensors, scratch, metadata))


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy each tensor that shares memory with an earlier one, as two kinds with one basis do; safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)


@explained()
def load_bases(path: str | os.PathLike[str], fingerprint: str | None = None) -> dict[str, Basis]:
    """Read the bases of all layer kinds in a file of `save_bases`.

    Args:
        path: the file.
        fingerprint: what the bases must have been made from; None accepts any.

    Raises:
        UserError: when the file is missing, unreadable, damaged, of another format, or of another fingerprint.
    """
    try:
        with open(path, "rb"):  # because safetensors calls every file missing that it cannot open
            pass
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, fingerprint)
            kinds, tensors = json.loads(metadata["kinds"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_content(path, kinds, tensors, metadata)
        return {kind: Basis(tensors.get(f"{kind}.in_basis"), tensors.get(f"{kind}.out_basis")) for kind in kinds}
    except FileNotFoundError:
        raise UserError(f"no basis file {path}: calibrate first, or name an existing file") from None
    except UserError:
        raise
    except OSError as error:
        raise unreadable(os.fspath(path), error) from error
    # A damaged or hostile file can fail anywhere: in the header, in the JSON, or in the types of what it holds.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable basis file ({error}): delete it and calibrate again") from None


def _check_content(
    path: str | os.PathLike[str], kinds: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Raise for a file whose content was changed after it was written, or that never held bases."""
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError("kinds are not a list of names")
    if unknown := set(tensors) - {f"{kind}.{side}_basis" for kind in kinds for side in ("in", "out")}:
        raise ValueError(f"{len(unknown)} tensors belong to no kind")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError("a matrix is not of floating point numbers")
    written = metadata.get("sha256")  # files of older versions have none
    if written is not None and written != _hash_tensors(tensors):
        raise UserError(f"{path} is damaged (its sha256 differs): delete it and calibrate again")


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all tensors with their names, dtypes and shapes."""
    return tensors_sha256((f"{name}{one.dtype}{tuple(one.shape)}", one) for name, one in sorted(tensors.items()))


def _check_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str], fingerprint: str | None) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} has format {metadata.get('format')}, not {FORMAT}: delete it and calibrate again")
    if fingerprint is not None and (found := metadata.get("fingerprint")) != fingerprint:
        raise UserError(
            f"{path} was made from another model, data or settings (fingerprint {found}, not {fingerprint}): "
            "name another file or delete it"
        )
