"""Products of a sparse and a dense matrix, for several sparse matrices at once, and when a dense product is faster."""

from __future__ import annotations

import torch
from torch import Tensor

# A sparse product is slower than a dense one when more than one in so many entries is kept. Measured break-even on a
# CPU: one in 12 for 384 inputs, one in 20 for 768. On a GPU in TF32: 24 sparse products (3072 x 768, one in 100 kept)
# took 8.6 ms on an H200, where dense ones run at 155 TFLOP/s, which is 2.3 ms (docs/performance.md).
_DENSE_FROM = 16
_DENSE_FROM_TF32 = 370


def is_dense_faster(values: Tensor, entries: int) -> bool:
    """Whether a matrix of so many entries, with `values` (..., k) of them not zero, is better multiplied as dense."""
    in_tf32 = values.is_cuda and values.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return (_DENSE_FROM_TF32 if in_tf32 else _DENSE_FROM) * values.shape[-1] >= entries


def multiply_sparse(rows: Tensor, columns: Tensor, values: Tensor, size: int, dense: Tensor) -> Tensor:
    """S @ dense (count, size, o) for `count` matrices S (size, c) with `values` (count, k) at `rows` and `columns`.

    The matrices are stacked to one of (count * size, c): one kernel launch instead of `count`.
    """
    count = len(values)
    rows = rows + torch.arange(count, device=rows.device)[:, None] * size
    index = torch.stack([rows.flatten(), columns.flatten()])
    sparse = torch.sparse_coo_tensor(index, values.flatten(), (count * size, len(dense)), check_invariants=False)
    return torch.sparse.mm(sparse, dense).view(count, size, -1)  # type: ignore[no-any-return]
