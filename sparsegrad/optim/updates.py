"""From the kept entries of one step to changed weights: moments, rotation back, weight decay, rounding."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.rounding import add_stochastic_each, decay_
from sparsegrad.optim.scratch import Scratch
from sparsegrad.optim.selection import Selection
from sparsegrad.sparse_product import is_dense_faster

_BLOCK = 256  # rows of a matrix that is added transposed


def apply(selection: Selection, states: list[dict[str, Any]], finite: Tensor, scratch: Scratch) -> None:
    """Update the moments and weights of one selection in place, or leave them unchanged where `finite` is False.

    Weight decay acts on whole weights. With fixed positions it acts on these entries alone, of the rotated weight where
    there is a basis: all others stay as they are.

    Args:
        selection: the kept entries of `count` weights (out, in).
        states: the optimizer's state of each weight.
        finite: bool tensor on the weights' device; False skips the step.
        scratch: buffers of this step.
    """
    group, index, size = selection.group, selection.index, selection.weights[0].numel()
    if "positions" in states[0]:  # always the same entries: only they have moments, in their own order
        index, size = torch.arange(index.shape[1], device=index.device).expand_as(index), index.shape[1]
    values = -selection.values if group.get("maximize") else selection.values
    change = MOMENTS[group["moments"]](states, index, values, size, group, finite)  # (count, k)
    rate = _decay_rate(group, finite, change.dtype) if group["weight_decay"] else None
    if rate is not None and "positions" in states[0]:
        change, rate = change - rate * _read_entries(selection, change.dtype), None
    _add_change(selection, change, rate, [state["step"] for state in states], scratch)


def _add_change(selection: Selection, change: Tensor, rate: Tensor | None, steps: list[Any], scratch: Scratch) -> None:
    """Add `change` (count, k) of the selected entries, rotated back, to the weights, after a decay by `rate`."""
    weights, shape = selection.weights, selection.weights[0].shape
    if len(weights) == 1 and _adds_in_place(weights[0], change):
        if rate is not None:
            decay_(weights, change, rate)
        add_sparse_(weights[0], selection.basis, selection.index[0], change[0], scratch)
        return
    if selection.basis is None:
        whole = torch.zeros(len(weights), shape.numel(), dtype=change.dtype, device=change.device)
        change = whole.scatter_(1, selection.index, change)
    else:
        change = selection.basis.unrotate_sparse(selection.index, change, shape)
    change = change.view(len(weights), *shape)  # (count, out, in)
    if rate is not None:
        decay_(weights, change, rate)
    if weights[0].dtype == change.dtype:
        torch._foreach_add_(weights, list(change))  # one kernel for all weights
        return
    add_stochastic_each(weights, change, selection.values, steps)


def _decay_rate(group: dict[str, Any], finite: Tensor, dtype: torch.dtype) -> Tensor:
    """The share of a weight that one step takes away, lr * weight_decay or 0: a scalar tensor, for changes of `dtype`.

    Only float64 has its own, because not all devices know it; a rate in float32 would round 1 - 1e-8 to 1. In bfloat16,
    which may be torch's default dtype, 1 - 1e-4 is 1.
    """
    lr, weight_decay = group["lr"], group["weight_decay"]
    rate: Tensor = finite.double() * lr * weight_decay if dtype == torch.float64 else lr * weight_decay * finite.float()
    return rate


def _read_entries(selection: Selection, dtype: torch.dtype) -> Tensor:
    """The selected entries (count, k) of the weights, rotated if there is a basis."""
    stacked = torch.stack(selection.weights).to(dtype)  # (count, out, in)
    rotated = stacked if selection.basis is None else selection.basis.rotate(stacked)
    return rotated.flatten(1).gather(1, selection.index)


def _adds_in_place(weight: Tensor, change: Tensor) -> bool:
    """Whether `add_sparse_` is allowed (no stochastic rounding) and faster than the products of whole matrices."""
    fits = weight.is_cpu and weight.dtype == change.dtype and weight.is_contiguous()
    return fits and not is_dense_faster(change, weight.numel())


def add_sparse_(weight: Tensor, basis: Basis | None, index: Tensor, values: Tensor, scratch: Scratch) -> None:
    """Add V S U^T to `weight` (out, in) in place, for a sparse S with `values` (k,) at flat positions `index` (k,).

    The products are added to the weight directly, without a matrix of the change. The longer side of S is multiplied
    first, in O(k n) operations for n features of that side; then the other one, as a dense product or not at all.

    Args:
        weight: contiguous, on a CPU, of the dtype of `values`.
        basis: of both sides, of one, or None; its columns are contiguous.
        index: distinct positions, ascending.
        values: the entries.
        scratch: buffers of this step.
    """
    m, n = weight.shape
    U, V = (None, None) if basis is None else (basis.in_basis, basis.out_basis)
    if U is None and V is None:
        weight.view(-1).index_add_(0, index, values)
        return
    if V is None:
        assert U is not None
        weight.addmm_(_make_sparse(index, values, (m, n)), U.T)
    elif U is None:
        _add_transposed(weight, _multiply_transposed(index, values, (m, n), V, scratch))
    elif m >= n:
        weight.addmm_(_multiply_transposed(index, values, (m, n), V, scratch).T, U.T)
    else:
        half = scratch.get("half", (m, n), weight).zero_()
        half.addmm_(_make_sparse(index, values, (m, n)), U.T)  # S U^T
        weight.addmm_(V, half)


def _multiply_transposed(index: Tensor, values: Tensor, shape: tuple[int, int], V: Tensor, scratch: Scratch) -> Tensor:
    """(V S)^T (in, out), for S as in `add_sparse_` and V (out, out)."""
    m, n = shape
    rows, columns = index // n, index % n
    # The positions are ascending, so the transpose needs a sort by column only. numpy's stable sort of 16 bits is a
    # radix sort, nine times as fast as `torch.sort`.
    keys = columns.numpy().astype(np.uint16) if n <= 2**16 else columns.numpy()
    order = torch.from_numpy(np.argsort(keys, kind="stable"))
    half = scratch.get("half", (n, m), V).zero_()
    return half.addmm_(_make_sparse((columns * m + rows)[order], values[order], (n, m)), V.T)


def _add_transposed(weight: Tensor, other: Tensor) -> None:
    """Add the transpose of `other` (in, out) to `weight` (out, in), in blocks that fit into the cache."""
    for start in range(0, len(other), _BLOCK):
        block = other[start : start + _BLOCK]
        weight[:, start : start + len(block)].add_(block.T)


def _make_sparse(index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix in CSR, which torch multiplies twice as fast as COO, from ascending flat positions."""
    rows = index // shape[1]
    starts = torch.zeros(shape[0] + 1, dtype=index.dtype, device=index.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(starts, index % shape[1], values, shape, check_invariants=False)
