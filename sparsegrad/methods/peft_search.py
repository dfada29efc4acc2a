"""Find the whole number whose share is closest to a wanted one, by measuring few of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

Share = Callable[[int], float | None]
"""Size -> the share that trains with it; None for a size that is refused."""


def search_divisors(share: Share, sides: Sequence[int], smallest: int) -> None:
    """Call `share` at every common divisor of `sides` from `smallest` on: block sizes must divide the widths."""
    common = math.gcd(*sides)
    for value in range(smallest, common + 1):
        if common % value == 0:
            share(value)


def search_sizes(share: Share, density: float, largest: int) -> None:
    """Call `share` at sizes up to about `largest`, among them the one whose share is closest to `density`.

    Shares rise with the size (a rank) or fall (RandLoRA, OSF), some not everywhere; single sizes may be refused.
    """
    if not _search_line(share, density):
        _zoom(share, density, _climb(share, density, largest))


def _search_line(share: Share, density: float) -> bool:
    """Call `share` where it gives `density` if it grows by the same amount with each step of the size, as of ranks."""
    first, second = share(1), share(2)
    if first is None or second is None or second <= first:
        return False
    low = max(1, int(1 + (density - first) / (second - first)))
    found = share(low)
    share(low + 1)
    return found is not None and abs(found - first - (low - 1) * (second - first)) < 1e-9


def _climb(share: Share, density: float, largest: int) -> dict[int, float | None]:
    """The shares of powers of 2 and of `largest`, up to the first two between which `density` lies."""
    tried: dict[int, float | None] = {}
    last = None
    for value in sorted({*(2**power for power in range(largest.bit_length())), largest}):
        tried[value] = found = share(value)
        if found is not None:
            if last is not None and (found < density) is not (last < density):
                break
            last = found
    return tried


def _zoom(share: Share, density: float, tried: dict[int, float | None]) -> None:
    """Call `share` beside the closest size in ever smaller steps, until the sizes next to it have been tried."""
    while accepted := {value: found for value, found in tried.items() if found is not None}:
        best = min(accepted, key=lambda value: (abs(accepted[value] - density), value))
        new = [value for low, high in _gaps(tried, density, best) for value in _between(low, high)]
        if not new:
            return
        tried |= {value: share(value) for value in new}


def _gaps(tried: dict[int, float | None], density: float, best: int) -> list[tuple[int, int]]:
    """The gaps between `best` and the sizes tried next to it; of these the one in which `density` lies, if any does."""
    values = sorted(tried)
    place = values.index(best)
    gaps = list(pairwise(values[max(place - 1, 0) : place + 2]))
    return [(low, high) for low, high in gaps if _lies_between(density, tried[low], tried[high])] or gaps


def _lies_between(density: float, one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and (one < density) is not (other < density)


def _between(low: int, high: int) -> Iterator[int]:
    """Up to three sizes inside a gap, at equal distances; all of a gap of four or less."""
    step = max(1, (high - low) // 4)
    yield from range(low + step, high, step)
