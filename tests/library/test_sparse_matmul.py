"""The sparse-by-dense product equals the dense one."""

import pytest
import torch

from sparsegrad import UserError, sparse_dense_matmul


@pytest.mark.parametrize("b", [0, 1, 4, 7])
@pytest.mark.parametrize("c", [0, 1, 3, 7])
@pytest.mark.parametrize("o", [0, 1, 5])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
def test_equals_the_dense_product_exactly(b: int, c: int, o: int, share: float) -> None:
    """Whole numbers, so that every order of summation is exact."""
    generator = torch.Generator().manual_seed(b + 10 * c + 100 * o)
    dense = torch.randint(-9, 10, (c, o), generator=generator).double()
    sparse = torch.randint(-9, 10, (b, c), generator=generator).double()
    # Whole rows and columns of zeros, which are what the product leaves out.
    sparse *= (torch.rand(b, 1, generator=generator) < share) * (torch.rand(1, c, generator=generator) < share)
    assert torch.equal(sparse_dense_matmul(sparse, dense), sparse @ dense)
    assert torch.equal(sparse_dense_matmul(sparse.to_sparse(), dense), sparse @ dense)


def test_uncoalesced_entries_add_up() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1], [2, 2]]), torch.tensor([3.0, 4.0]), (3, 4))
    assert torch.equal(sparse_dense_matmul(sparse, torch.eye(4)), sparse.to_dense())


def test_only_the_nonzero_part_is_multiplied() -> None:
    """What the product is for: infinities where the sparse matrix is zero do no harm."""
    dense = torch.ones(3, 2)
    dense[1] = float("inf")
    assert torch.equal(sparse_dense_matmul(torch.tensor([[1.0, 0.0, 2.0]]), dense), torch.tensor([[3.0, 3.0]]))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2,), (2, 3)), ((2, 3), (3,))])
def test_operands_that_do_not_fit_are_named(shapes) -> None:
    with pytest.raises(UserError, match="is not defined"):
        sparse_dense_matmul(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
