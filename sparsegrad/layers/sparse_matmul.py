"""The product of a sparse and a dense matrix by way of small dense ones (paper, section 3.2, eq. 1-2)."""

from __future__ import annotations

from torch import Tensor

from sparsegrad.errors import UserError


def sparse_dense_matmul(sparse: Tensor, dense: Tensor) -> Tensor:
    """Multiply `sparse` (b, c), which has many all-zero rows or columns, by `dense` (c, o).

    The nonzero rows and columns are taken out (eq. 1), the small dense matrices are multiplied, and the product is
    written back to its rows (eq. 2). The result (b, o) is strided and equals `sparse @ dense`: only products with zero
    are left out, which may change the order of summation and so the last digit.

    Args:
        sparse: (b, c), strided or sparse COO.
        dense: (c, o), strided, of the same dtype.

    Raises:
        UserError: when the operands are not two matrices whose inner sizes agree.
    """
    if sparse.dim() != 2 or dense.dim() != 2 or sparse.shape[1] != dense.shape[0]:
        raise UserError(
            f"sparse_dense_matmul of {tuple(sparse.shape)} by {tuple(dense.shape)} is not defined: "
            "give two matrices (b, c) and (c, o)"
        )
    rows, columns, small = _compact(sparse)
    product = dense.new_zeros(sparse.shape[0], dense.shape[1])
    return product.index_copy_(0, rows, small @ dense[columns])


def _compact(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nonzero rows, the nonzero columns, and the dense matrix that lies at their crossings."""
    if sparse.is_sparse:
        return _compact_coo(sparse.coalesce())
    nonzero = sparse != 0
    rows, columns = nonzero.any(1).nonzero().flatten(), nonzero.any(0).nonzero().flatten()
    return rows, columns, sparse[rows][:, columns]


def _compact_coo(sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, row_of = sparse.indices()[0].unique(return_inverse=True)  # type: ignore[no-untyped-call]
    columns, column_of = sparse.indices()[1].unique(return_inverse=True)  # type: ignore[no-untyped-call]
    small = sparse.values().new_zeros(len(rows), len(columns))
    small[row_of, column_of] = sparse.values()
    return rows, columns, small
