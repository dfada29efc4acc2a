"""HOSVD of calibration gradients by Gram matrices (paper, section 3.1).

A linear has weight W (out, in) and gradient G (out, in). The gradients of one layer kind are stacked to a tensor
(count, out, in). The factor matrices of its HOSVD are the eigenvectors of the Gram matrices of its unfoldings, so the
sums of G G^T (out, out) and G^T G (in, in) are enough. They give the same factors and need O(out^2 + in^2) memory for
any number of gradients.

A Gram matrix squares the singular values. Summed in float32 it resolves directions down to about 1e-3 of the largest
singular value, in float64 down to 1e-8. Directions below that hold less than 1e-6 of the energy: their basis vectors
are orthogonal, but otherwise arbitrary.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsegrad.arguments import show
from sparsegrad.basis import Basis, small_side
from sparsegrad.calibration.eigh import is_large, large_eigenvectors, to_host
from sparsegrad.errors import UserError, check_choice, missing_package


@dataclass
class Grams:
    """Running sums of G G^T (out, out) and G^T G (in, in) over the gradients of one layer kind.

    Above the diagonal blocks the sums are written by `basis` only.

    The sums are float64 for float64 gradients and float32 otherwise.

    Attributes:
        out_gram: sum of G G^T (out, out); None before the first gradient, or if `sides` leaves it out.
        in_gram: sum of G^T G (in, in); likewise.
        count: number of gradients in the sums.
        sides: `both`, or only `in`, `out`, or `small`, the side with fewer features.
        shape: (out, in) of the gradients; None before the first.
        device: device of the sums; None uses that of the first gradient. Gradients on other devices are moved there.
    """

    out_gram: Tensor | None = None
    in_gram: Tensor | None = None
    count: int = 0
    sides: str = "both"
    shape: tuple[int, ...] | None = None
    device: torch.device | str | None = None

    def add(self, gradient: Tensor) -> None:
        """Add one gradient (out, in) to the sums.

        Raises:
            UserError: when it is not a matrix, or its shape differs from that of the first.
        """
        if not isinstance(gradient, Tensor) or gradient.ndim != 2:
            shape = f"has shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else f"is {show(gradient)}"
            raise UserError(f"a gradient {shape}: give tensors (out, in)")
        G = gradient.detach().to(self.device, torch.promote_types(gradient.dtype, torch.float32))
        if self.shape is None:
            self._begin(G)
        if self.shape != tuple(G.shape):
            raise UserError(
                f"gradients of {tuple(G.shape)} and {self.shape} are in one layer kind: name one kind per shape"
            )
        # In place: no second matrix (out, out) or (in, in).
        if self.out_gram is not None:
            _add_product(self.out_gram, G)
        if self.in_gram is not None:
            _add_product(self.in_gram, G.T)
        self.count += 1

    def _begin(self, G: Tensor) -> None:
        self.shape, self.device = tuple(G.shape), G.device
        sides = small_side(self.shape) if self.sides == "small" else self.sides
        self.out_gram = None if sides == "in" else G.new_zeros(G.shape[0], G.shape[0])
        self.in_gram = None if sides == "out" else G.new_zeros(G.shape[1], G.shape[1])

    def basis(self) -> Basis:
        """The HOSVD factor matrices, computed in float64 and cast to the dtype of the sums.

        With a large side (see `sparsegrad.calibration.eigh`) this consumes the sums, because their memory is needed.
        The next `add` then starts from zero.

        Raises:
            UserError: when there is no gradient, or one was not finite.
        """
        if self.shape is None:
            raise UserError("HOSVD of no gradients is not defined: give at least one gradient")
        if any(gram is not None and is_large(len(gram), gram.device) for gram in (self.in_gram, self.out_gram)):
            self.shape = None  # marks the sums as used up, for `_take_gram` and the next `add`
        # One side after the other, and no reference kept here: each Gram matrix is freed once it is decomposed.
        return Basis(_decompose(self._take_gram("in_gram")), _decompose(self._take_gram("out_gram")))

    def _take_gram(self, name: str) -> Tensor | None:
        """Return a sum, and drop it from this object if the sums are used up."""
        gram: Tensor | None = getattr(self, name)
        if gram is not None:
            _mirror(gram)
        if self.shape is None:
            setattr(self, name, None)
        return gram


def _blocks(size: int, device: torch.device) -> range:
    """First rows of the blocks in which a symmetric matrix of `size` rows is summed: 8 of a large one on a CPU."""
    width = max(128, -(-size // 8)) if device.type == "cpu" else size
    return range(0, size, width)


def _add_product(gram: Tensor, A: Tensor) -> None:
    """Add A A^T to `gram` (n, n) in place, on and below the blocks of the diagonal; A is (n, o).

    The product is symmetric, and torch has no routine that uses it. Eight blocks need 9/16 of the operations.
    """
    starts = _blocks(len(gram), gram.device)
    for start in starts:
        stop = start + starts.step
        gram[start:, start:stop].addmm_(A[start:], A[start:stop].T)


def _mirror(gram: Tensor) -> None:
    """Copy what `_add_product` has summed below the diagonal to above it, in place."""
    starts = _blocks(len(gram), gram.device)
    for start in starts:
        stop = start + starts.step
        gram[start:stop, stop:] = gram[stop:, start:stop].T


def check_finite(total: Tensor) -> None:
    """Raise `UserError` if a sum over calibration gradients is not finite."""
    if not torch.isfinite(total).all():
        raise UserError("a calibration gradient is not finite: calibrate in float32, or check the data")


def _warn_of_zeros(gram: Tensor) -> None:
    if not gram.any():
        warnings.warn(
            "all calibration gradients of a layer kind are zero, as those of a linear before one that starts at zero: "
            "its basis is arbitrary; calibrate after some training steps",
            stacklevel=2,
        )


def _decompose(gram: Tensor | None) -> Tensor | None:
    """Columns (n, n) = eigenvectors of a Gram matrix (n, n) by decreasing eigenvalue, computed in float64."""
    if gram is None:
        return None
    check_finite(gram)
    _warn_of_zeros(gram)
    device, dtype = gram.device, gram.dtype
    if is_large(len(gram), gram.device):
        gram = to_host(gram)  # frees the original
        vectors = large_eigenvectors(gram)
    else:
        # The matrix is symmetric: its transpose equals it, but is column-major, so that LAPACK can work in place.
        vectors = gram.to(torch.float64, copy=True).T
        torch.linalg.eigh(vectors, out=(vectors.new_empty(len(vectors)), vectors))
    del gram
    # eigh sorts by increasing eigenvalue: flip. Cast before moving, so that less is copied.
    return vectors.to(dtype).to(device).flip(-1)


def hosvd(gradients: Iterable[Tensor], method: str = "gram") -> Basis:
    """HOSVD of stacked gradients (paper, section 3.1).

    Args:
        gradients: any number of tensors (out, in) of one shape, read once; or one tensor (steps, out, in).
        method: `gram` (default), with O(out^2 + in^2) memory; or `stacked`, the reference: an SVD of the unfoldings of
            the whole tensor by `tensorly`.

    Returns:
        The basis of both sides, in the gradients' dtype (float32 for lower precisions).

    Raises:
        UserError: for what is not a stack of matrices, no gradients, different shapes, or a gradient that is not
            finite.
    """
    check_choice("method", method, ("gram", "stacked"))
    _check_stack(gradients)
    if method == "stacked":
        return _hosvd_stacked(list(gradients))
    grams = Grams()
    for gradient in gradients:
        grams.add(gradient)
    return grams.basis()


def _check_stack(gradients: Any) -> None:
    if isinstance(gradients, Tensor) and gradients.ndim != 3:
        given = f"a tensor {tuple(gradients.shape)}"
    elif not isinstance(gradients, Iterable):
        given = show(gradients)
    else:
        return
    raise UserError(f"gradients is {given}: give one tensor (steps, out, in), or several (out, in), as hosvd([G, ...])")


def _hosvd_stacked(gradients: list[Tensor]) -> Basis:
    if not gradients:
        raise UserError("HOSVD of no gradients is not defined: give at least one gradient")
    try:
        import tensorly
    except ModuleNotFoundError as error:
        raise missing_package('hosvd(method="stacked")', error.name, "dev") from None
    if len({tuple(one.shape) for one in gradients}) > 1 or gradients[0].ndim != 2:
        raise UserError("gradients of several shapes have no common HOSVD: give tensors (out, in) of one shape")
    dtype = functools.reduce(torch.promote_types, (one.dtype for one in gradients), torch.float32)
    stacked = torch.stack([one.detach().double() for one in gradients])  # (count, out, in)
    check_finite(stacked)
    _warn_of_zeros(stacked)
    tensor = stacked.numpy(force=True)
    # Mode 1 unfolds to (out, count * in), mode 2 to (in, count * out).
    unfolded = [tensorly.unfold(tensor, mode) for mode in (1, 2)]
    factors = [tensorly.tenalg.svd_interface(one, n_eigenvecs=min(one.shape))[0] for one in unfolded]
    out_basis, in_basis = (
        _complete(torch.from_numpy(factor.copy())).to(gradients[0].device, dtype) for factor in factors
    )
    return Basis(in_basis, out_basis)


def _complete(factor: Tensor) -> Tensor:
    """Append orthogonal columns to (side, count) until it is square; few gradients span fewer directions than a side.

    These directions hold no energy: as with `gram`, their vectors are arbitrary.
    """
    rest = torch.linalg.qr(factor, mode="complete").Q[:, factor.shape[1] :]
    return torch.cat([factor, rest], dim=1)
