"""The product of a sparse and a dense matrix through small dense matrices (paper, section 3.2, eq. 1-2)."""

from __future__ import annotations

from torch import Tensor

from sparsegrad.errors import UserError


def sparse_dense_matmul(sparse: Tensor, dense: Tensor) -> Tensor:
    """Multiply `sparse` (b, c), in which many rows or columns are entirely zero, by `dense` (c, o).

    Extract the nonzero rows and columns (eq. 1), multiply the small dense matrices, and write the product back to its
    rows (eq. 2). Only products with zero are left out. This may change the order of summation, and so the last digit.

    Args:
        sparse: (b, c), strided or sparse COO.
        dense: (c, o), strided, of the same dtype.

    Returns:
        `sparse @ dense` (b, o), strided.

    Raises:
        UserError: when the operands are not two matrices whose inner sizes agree.
    """
    if sparse.dim() != 2 or dense.dim() != 2 or sparse.shape[1] != dense.shape[0]:
        raise UserError(
            f"sparse_dense_matmul of {tuple(sparse.shape)} by {tuple(dense.shape)} is not defined: "
            "give two matrices (b, c) and (c, o)"
        )
    rows, columns, small = _compact(sparse)  # (b',), (c',) and (b', c')
    product = dense.new_zeros(sparse.shape[0], dense.shape[1])
    return product.index_copy_(0, rows, small @ dense[columns])


def _compact(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the nonzero rows and columns, and the dense matrix (rows, columns) of the entries there."""
    if sparse.is_sparse:
        return _compact_coo(sparse.coalesce())
    nonzero = sparse != 0
    rows, columns = nonzero.any(1).nonzero().flatten(), nonzero.any(0).nonzero().flatten()
    return rows, columns, sparse[rows][:, columns]


def _compact_coo(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_compact` for a coalesced COO tensor, without making it dense."""
    # `row_of` is the position of each entry's row among the nonzero rows; likewise `column_of`.
    rows, row_of = sparse.indices()[0].unique(return_inverse=True)  # type: ignore[no-untyped-call]
    columns, column_of = sparse.indices()[1].unique(return_inverse=True)  # type: ignore[no-untyped-call]
    small = sparse.values().new_zeros(len(rows), len(columns))
    small[row_of, column_of] = sparse.values()
    return rows, columns, small
