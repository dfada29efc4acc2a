"""Where the bases of SparseGrad come from: a calibration, or, to study what the basis does, another rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.errors import UserError, fail
from sparsegrad.methods.base import Context
from sparsegrad.progress import track
from sparsegrad.targets import Linears

BASES = ("hosvd", "authors", "random", "none")  # by name; any other value of `basis` is a file


def calibrated_bases(
    model: nn.Module,
    linears: Linears,
    context: Context,
    steps: int,
    *,
    sides: str = "both",
    update: Callable[[], None] | None = None,
) -> tuple[dict[str, Basis], dict[str, Any]]:
    """Return the bases of all layer kinds and their cost, from the store or from `steps` batches.

    Args:
        model: the model, with the gradients of its MLP weights enabled.
        linears: layer kind -> name -> MLP linear.
        context: what the run hands in.
        steps: calibration batches.
        sides: which bases are computed: `both`, `in`, `out` or `small`.
        update: called after every batch, for a calibration that also trains. Such a calibration is never read from
            the store, because its updates would be missing.
    """
    batches = islice(context.batches(), steps)
    # Settings name the stored basis; `both`, the default, is left out of the name.
    settings = {"steps": steps, **({} if sides == "both" else {"sides": sides})} if update is None else None
    return context.calibrated(
        settings, lambda: calibrate(model, batches, linears, steps, sides=sides, update=update, progress=track)
    )


def transpose_in_basis(basis: Basis) -> Basis:
    """V^T G U^T instead of V^T G U, as in the authors' code: an arbitrary rotation of the input side."""
    return basis if basis.in_basis is None else Basis(basis.in_basis.T.contiguous(), basis.out_basis)


def refuse_untransposed(sides: str, left_out: str) -> UserError:
    """The error for `basis=authors` with `sides` that leave out what it transposes."""
    why = f"method.basis=authors transposes the basis of the input side, and these sides leave out {left_out}"
    return fail("method.sides", sides, why, "use method.sides=both or in, or method.basis=hosvd")


def make_basis(name: str, shape: tuple[int, int]) -> Basis:
    """The identity, or orthogonal matrices drawn by torch's generator, which the run's seed has set."""
    if name == "none":
        return Basis.identity(*shape)
    V, U = (torch.linalg.qr(torch.randn(size, size)).Q for size in shape)
    return Basis(U, V)
