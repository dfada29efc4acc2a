"""HOSVD of calibration gradients by Gram matrices (paper, section 3.1).

A linear has weight W (out, in) and gradient G (out, in). All gradients of one layer kind are stacked to a tensor
(count, out, in). Its HOSVD factor matrices are the eigenvectors of the Grams of its unfoldings, so it is enough to
accumulate sum G G^T (out, out) and sum G^T G (in, in): the same factors, and O(out^2 + in^2) memory however many
gradients come. A Gram squares the singular values: summed in float32 it resolves directions down to about 1e-3 of the
largest singular value (float64: 1e-8). What lies below holds less than 1e-6 of the energy; its basis is orthogonal
still, but arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsegrad.basis import Basis, small_side
from sparsegrad.calibration.eigh import is_large, large_eigenvectors, to_host
from sparsegrad.errors import UserError, check_choice, missing_package


@dataclass
class Grams:
    """Running sums of G G^T (out, out) and G^T G (in, in) over the gradients of one layer kind.

    Sums are kept in float32 for gradients of at most float32, in float64 for float64.

    Attributes:
        sides: `both`, or the only one that is wanted: `in`, `out`, or `small`, the side with fewer features.
        device: where the sums are; None: where the first gradient is. Those on other devices are brought there.
    """

    out_gram: Tensor | None = None
    in_gram: Tensor | None = None
    count: int = field(default=0)
    sides: str = "both"
    shape: tuple[int, ...] | None = None
    device: torch.device | str | None = None

    def add(self, gradient: Tensor) -> None:
        """Add one gradient (out, in).

        Raises:
            UserError: when its shape differs from the first one's.
        """
        G = gradient.detach().to(self.device, torch.promote_types(gradient.dtype, torch.float32))
        if self.shape is None:
            self._begin(G)
        if self.shape != tuple(G.shape):
            raise UserError(
                f"gradients of {tuple(G.shape)} and {self.shape} are in one layer kind: name one kind per shape"
            )
        if self.out_gram is not None:
            self.out_gram.addmm_(G, G.T)
        if self.in_gram is not None:
            self.in_gram.addmm_(G.T, G)
        self.count += 1

    def _begin(self, G: Tensor) -> None:
        self.shape, self.device = tuple(G.shape), G.device
        sides = small_side(self.shape) if self.sides == "small" else self.sides
        self.out_gram = None if sides == "in" else G.new_zeros(G.shape[0], G.shape[0])
        self.in_gram = None if sides == "out" else G.new_zeros(G.shape[1], G.shape[1])

    def basis(self, dtype: torch.dtype | None = None) -> Basis:
        """The HOSVD factor matrices, by `eigh` in float64, cast to `dtype` (default: the sums' own).

        With a large side (see `large_side`) the sums are used up: their memory is needed.

        Raises:
            UserError: when there is no gradient, or one was not finite.
        """
        if self.shape is None:
            raise UserError("HOSVD of no gradients is not defined: give at least one gradient")
        if any(gram is not None and is_large(len(gram), gram.device) for gram in (self.in_gram, self.out_gram)):
            self.shape = None  # the next gradient begins anew
        return Basis(_eigenvectors(self._take("in_gram"), dtype), _eigenvectors(self._take("out_gram"), dtype))

    def _take(self, name: str) -> Tensor | None:
        """A sum, to be decomposed; given away where it is used up."""
        gram: Tensor | None = getattr(self, name)
        if self.shape is None:
            setattr(self, name, None)
        return gram


def _eigenvectors(gram: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Columns = eigenvectors of a symmetric matrix by falling eigenvalue, computed in float64."""
    if gram is None:
        return None
    if not torch.isfinite(gram).all():
        raise UserError("a calibration gradient is not finite: lower the precision's risk (fp32) or check the data")
    device, dtype = gram.device, dtype or gram.dtype
    if is_large(len(gram), gram.device):
        gram = to_host(gram)  # the sum itself goes
        vectors = large_eigenvectors(gram)
    else:
        # Symmetric, so its transpose is the same matrix in the order that LAPACK writes: it is overwritten, not copied.
        vectors = gram.to(torch.float64, copy=True).T
        torch.linalg.eigh(vectors, out=(vectors.new_empty(len(vectors)), vectors))
    del gram
    return vectors.to(dtype).to(device).flip(-1)  # narrowed first, so that what is copied is small


def hosvd(gradients: Iterable[Tensor], method: str = "gram") -> Basis:
    """HOSVD of stacked gradients: an iterable of tensors (out, in) to a `Basis` (paper, section 3.1).

    Args:
        gradients: any number of (out, in) tensors of one shape; read once, none kept by `gram`.
        method: `gram` (default; O(out^2 + in^2) memory) or `stacked` (the reference: the whole tensor in
            memory, SVD of its unfoldings through `tensorly`).

    Raises:
        UserError: for no gradients, different shapes, or a gradient that is not finite.
    """
    check_choice("method", method, ("gram", "stacked"))
    if method == "stacked":
        return _hosvd_stacked(list(gradients))
    grams = Grams()
    for gradient in gradients:
        grams.add(gradient)
    return grams.basis()


def _hosvd_stacked(gradients: list[Tensor]) -> Basis:
    if not gradients:
        raise UserError("HOSVD of no gradients is not defined: give at least one gradient")
    try:
        import tensorly
    except ModuleNotFoundError as error:
        raise missing_package('hosvd(method="stacked")', error.name, "dev") from None
    tensor = torch.stack(gradients).double().numpy(force=True)  # (count, out, in)
    factors = [
        tensorly.tenalg.svd_interface(tensorly.unfold(tensor, mode), n_eigenvecs=tensor.shape[mode])[0]
        for mode in (1, 2)
    ]
    out_basis, in_basis = (torch.from_numpy(factor.copy()).to(gradients[0]) for factor in factors)
    return Basis(in_basis, out_basis)
