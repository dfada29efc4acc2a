"""Which entries are kept."""

import pytest
import torch

from sparsegrad import UserError
from sparsegrad.optim.selection import count_kept, top_k_index


def heavy_tailed() -> torch.Tensor:
    return torch.randn(300, 400).pow(5)


def striped() -> torch.Tensor:
    """All large entries are in a few columns, which a regular sample may miss."""
    matrix = torch.randn(310, 400) * 1e-3
    matrix[:, ::31] += 1.0
    return matrix


@pytest.mark.parametrize("keep", [1, 37, 1200, 60_000, 120_000])
@pytest.mark.parametrize("make", [heavy_tailed, striped, lambda: torch.randn(300, 400), lambda: torch.randn(7, 400)])
def test_the_largest_are_selected_each_once(make, keep: int) -> None:
    torch.manual_seed(0)
    matrix = make()
    keep = min(keep, matrix.numel())
    index = top_k_index(matrix, keep)
    expected = matrix.abs().flatten().sort(descending=True).values[:keep]
    assert len(index) == keep
    assert bool((index.diff() > 0).all())
    assert torch.equal(matrix.abs().flatten()[index].sort(descending=True).values, expected)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_equal_entries_still_give_as_many_as_asked(value: float) -> None:
    index = top_k_index(torch.full((300, 400), value), 1200)
    assert len(index) == 1200
    assert bool((index.diff() > 0).all())


def test_density_rounds_to_the_nearest_count() -> None:
    assert count_kept((3072, 768), density=0.01) == 23593
    assert count_kept((10, 10), density=1) == 100
    assert count_kept((10, 10), keep=100) == 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "keep=None and density=None: give exactly one"),
        ({"keep": 1, "density": 0.1}, r"keep=1 and density=0\.1: give exactly one"),
        ({"keep": 1.5}, r"keep=1\.5"),
        ({"keep": True}, "keep=True"),
        ({"density": "x"}, "density=x"),
        ({"density": 0.001}, r"density=0\.001 keeps no entry of a weight \(10, 10\): give at least 0\.01"),
    ],
)
def test_bad_input_is_named(arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        count_kept((10, 10), **arguments)
