"""Which entries of a gradient are kept: how many, and where (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsegrad.errors import UserError, check_integer, check_number

_SAMPLE_FROM = 2**16  # entries; below it a sample saves nothing
_SAMPLE_STRIDE = 31  # odd, so that it does not run along one column


def count_kept(shape: Sequence[int], *, keep: int | None = None, density: float | None = None) -> int:
    """Number of kept entries of a weight of `shape` (out, in): `keep` itself, or `density` of its entries.

    Raises:
        UserError: when both or neither are given, `density` is outside (0, 1], it rounds to no entry, or `keep` is
            outside 1 .. out * in.
    """
    size = shape[0] * shape[1]
    if (keep is None) == (density is None):
        raise UserError(f"keep={keep} and density={density}: give exactly one of them")
    if density is None:
        return check_integer(
            "keep", keep, at_least=1, at_most=size, remedy=f"the weight {tuple(shape)} has {size} entries"
        )
    check_density(density)
    kept = round(density * size)
    if kept < 1:
        raise UserError(f"density={density} keeps no entry of a weight {tuple(shape)}: give at least {1 / size:.2g}")
    return kept


def check_density(density: float | None) -> float | None:
    """Return `density` if it is None or in (0, 1], or raise `UserError`."""
    if density is not None:
        check_number("density", density, above=0, at_most=1, remedy="the paper keeps 0.01")
    return density


def top_k_index(gradient: Tensor, keep: int) -> Tensor:
    """Flat positions (keep,) of the entries of largest magnitude of a matrix (out, in), in no order."""
    magnitudes = gradient.abs().flatten()
    if magnitudes.is_cpu and magnitudes.numel() >= _SAMPLE_FROM:
        candidates = _candidates(magnitudes, keep)
        if len(candidates) >= keep:
            return candidates[magnitudes[candidates].topk(keep, sorted=False).indices]
    return magnitudes.topk(keep, sorted=False).indices


def _candidates(magnitudes: Tensor, keep: int) -> Tensor:
    """Positions of all entries above a threshold that a regular sample puts somewhat below the `keep`-th largest.

    Exact whenever there are at least `keep` of them. On a CPU `topk` of everything costs 4 to 9 times as much.
    """
    sample = magnitudes[::_SAMPLE_STRIDE]
    wanted = min(len(sample), keep * 5 // (4 * _SAMPLE_STRIDE) + 32)
    threshold = sample.topk(wanted, sorted=False).values.min()
    return (magnitudes >= threshold).nonzero().flatten()
