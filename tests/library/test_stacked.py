"""`hosvd(method="stacked")` of few gradients, and adapters of models whose embeddings were resized."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from adapter_checks import train

from sparsegrad import UserError, hosvd, load_adapter, save_adapter


@pytest.mark.parametrize(("shape", "count"), [((12, 8), 1), ((24, 4), 2), ((4, 24), 2), ((8, 8), 1), ((1, 5), 1)])
@pytest.mark.parametrize("method", ["gram", "stacked"])
def test_few_gradients_give_a_whole_orthogonal_basis(method: str, shape: tuple[int, int], count: int) -> None:
    """count * other side < side: fewer directions than the basis has columns."""
    if method == "stacked":
        pytest.importorskip("tensorly")
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basis = hosvd(gradients, method=method)
    assert basis.in_basis is not None
    assert basis.out_basis is not None
    for side, square in zip(shape, (basis.out_basis, basis.in_basis), strict=True):
        assert square.shape == (side, side)
        torch.testing.assert_close(square.T @ square, torch.eye(side, dtype=torch.float64), rtol=0, atol=1e-12)
    # All energy is in the leading directions.
    used = [min(side, count * other) for side, other in (shape, shape[::-1])]
    for gradient in gradients:
        rotated = basis.out_basis.T @ gradient @ basis.in_basis
        torch.testing.assert_close(rotated[: used[0], : used[1]].norm(), gradient.norm(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_an_adapter_of_resized_embeddings_needs_a_base_that_was_resized(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from model_zoo import tiny_batches, tiny_model

    before = tiny_model(layout, torch.float32)
    model = copy.deepcopy(before)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 4)
    base = copy.deepcopy(model)
    train(model, tiny_batches(layout, 4))
    with pytest.raises(UserError, match=rf"\({rows}, 16\).*\({rows + 4}, 16\).*give the base"):
        save_adapter(model, tmp_path / "adapter", before)
    assert not (tmp_path / "adapter").exists()
    # The remedy: the base is the model as it was before training, with its new rows.
    save_adapter(model, tmp_path / "adapter", base)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path / "adapter").merge()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match="embed"):
        load_adapter(copy.deepcopy(before), tmp_path / "adapter")
