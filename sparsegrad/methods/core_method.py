"""What the methods with a trained core share: its size, and what follows from it before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegrad.layers.common import check_linear
from sparsegrad.methods.core import check_size, count_cores, find_ranks
from sparsegrad.targets import Linears, all_linears


@dataclass(frozen=True, kw_only=True)
class CoreMethod:
    """The size of a core R (r, r) between two frozen factors.

    Attributes:
        density: share of a weight's entries that the core has: r^2 is closest to it; or
        rank: r.
    """

    density: float | None = 0.01
    rank: int | None = None
    name: str

    def __post_init__(self) -> None:
        check_size(self.density, self.rank)

    def find_ranks(self, linears: Linears) -> dict[str, int]:
        """r of each layer kind."""
        return find_ranks(linears, self.density, self.rank)

    def check(self, linears: Linears) -> None:
        """Raise `UserError` if the rank is 0 or exceeds the smaller side of a weight, or for GPT-2's `Conv1D`."""
        for linear in all_linears(linears):
            check_linear(linear, f"method={self.name}", "use method=sparsegrad")
        self.find_ranks(linears)

    def count_added(self, linears: Linears) -> int:
        """See `Method`."""
        return count_cores(linears, self.find_ranks(linears))
