"""The change of one weight as a product B A of two thin matrices: exact from a core, or a truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear


@dataclass(frozen=True)
class Factors:
    """A change (out, in) as B A.

    Attributes:
        A: (r, in), float32, or float64 for a float64 weight.
        B: (out, r), of the same dtype.
        error: |change - B A| / |change| in the Frobenius norm, measured with A and B as stored; 0 for no change.
    """

    A: Tensor
    B: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]


def subtract(after: Tensor, before: Tensor, transposed: bool) -> Tensor:
    """The change of a weight as (out, in) in float64; `transposed` is for `Conv1D`, which stores (in, out)."""
    # MPS has no float64.
    device = torch.device("cpu") if after.device.type == "mps" else after.device
    change = after.detach().to(device, torch.float64) - before.detach().to(device, torch.float64)
    return change.T if transposed else change


def factor_block(name: str, block: BlockLinear, change: Tensor) -> Factors:
    """The factors of a `BlockLinear`, whose change is V_c core U_r^T by construction; their rank is min(c, r).

    Args:
        name: for the error.
        block: its core is already merged into its weight.
        change: weight minus base (out, in), for the error and to detect a wrong base.

    Raises:
        UserError: when the core does not explain the change, so that the base is not that of the training.
    """
    core = block.core.detach().to(change)  # (c, r)
    U_r, V_c = block.in_basis.to(change), block.out_basis.to(change)  # (in, r) and (out, c)
    # The longer side of the core is multiplied first, which leaves the shorter one as the rank.
    B, A = (V_c, core @ U_r.T) if core.shape[0] < core.shape[1] else (V_c @ core, U_r.T)
    factors = _finish(change, A, B, block.weight.dtype)
    missed = factors.error * float(change.norm())
    # Each merge rounds W, so the two agree up to the dtype's precision times a factor for thousands of steps.
    if missed > 1000 * torch.finfo(block.weight.dtype).eps * float(block.weight.norm()):
        raise UserError(
            f"{name}.weight differs from its base by more than its core (relative error {factors.error:.2g}): give "
            "base= as the model was before prepare, or call sparsegrad.to_linears(model) and give rank= or max_error="
        )
    return factors


def truncate(change: Tensor, dtype: torch.dtype, rank: int | None, max_error: float | None) -> Factors:
    """The best factors of `change` (out, in) by a truncated SVD, computed from the Gram matrix of the shorter side.

    Args:
        change: float64.
        dtype: dtype of the weight.
        rank: rank of the factors, at most the shorter side; or
        max_error: the rank is the smallest whose relative error is at most this.
    """
    wide = change.shape[0] <= change.shape[1]
    D = change if wide else change.T  # (m, n) with m <= n
    # Eigenvectors of D D^T = left singular vectors of D; `eigh` sorts by increasing eigenvalue.
    Q = torch.linalg.eigh(D @ D.T).eigenvectors.flip(1)  # (m, m)
    P = Q.T @ D  # (m, n); row i has norm s_i. The norms are more accurate than roots of eigenvalues.
    if rank is None:
        assert max_error is not None
        rank = _smallest_rank(P.square().sum(1), max_error)
    Q, P = _balance(Q[:, :rank], P[:rank])
    return _finish(change, P, Q, dtype) if wide else _finish(change, Q.T, P.T, dtype)


def _smallest_rank(energy: Tensor, max_error: float) -> int:
    """Number of leading entries of `energy` (m,) that leave out at most the share `max_error`^2 of its sum."""
    left_out = energy.flip(0).cumsum(0).flip(0)  # left_out[r]: what rank r misses
    # 1 % is reserved for the rounding of A and B to float32, which is 1e-7 of the change.
    allowed = (0.99 * max_error) ** 2 * energy.sum()
    return max(1, int((left_out > allowed).sum()))


def _balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Scale column i of B and row i of A to the same norm, so that neither underflows when served in float16."""
    norms = A.norm(dim=1)
    root = torch.where(norms > 0, norms, 1).sqrt()
    return B * root, A / root[:, None]


def _finish(change: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Factors:
    """Round the factors to their stored dtype, and measure what they miss."""
    stored = torch.promote_types(dtype, torch.float32)
    A, B = A.to(stored).contiguous(), B.to(stored).contiguous()
    size = float(change.norm())
    error = float((change - B.double() @ A.double()).norm()) / size if size else 0.0
    return Factors(A.cpu(), B.cpu(), error)
