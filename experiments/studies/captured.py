"""How much of a weight gradient each engine captures: the share of its squared norm in the entries that it trains.

All arms train the same number of entries. A larger share does not imply better training.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from experiments.studies.probe import top_energy
from sparsegrad.basis import Basis
from sparsegrad.layers.common import core_shape

DENSITY = 0.01


def leading_energy(matrix: Tensor, rows: int, columns: int) -> float:
    """Share of the squared norm of a matrix (out, in) in its leading block (rows, columns)."""
    squares = matrix.double().square()
    total = squares.sum().item()
    return 0.0 if total == 0 else squares[:rows, :columns].sum().item() / total


def _top(sides: str) -> Callable[[Tensor, Basis], float]:
    return lambda G, basis: top_energy(basis.only(sides).rotate(G), DENSITY)


def _block(G: Tensor, basis: Basis) -> float:
    return leading_energy(basis.rotate(G), *core_shape((G.shape[0], G.shape[1]), DENSITY))


def _in_only(G: Tensor, basis: Basis) -> float:
    # All outputs and the leading 1 % of the rotated inputs: the same number of entries as 1 % of the weight.
    return leading_energy(basis.only("in").rotate(G), G.shape[0], max(1, round(DENSITY * G.shape[1])))


# Arm -> function of a gradient (out, in) and a two-sided basis that returns the captured share. The names are stored.
ARMS: dict[str, Callable[[Tensor, Basis], float]] = {
    "exact, both sides": _top("both"),
    "small side": _top("small"),
    "MeProp": lambda G, basis: top_energy(G, DENSITY),
    "block, proportional": _block,
    "block, inputs alone": _in_only,
}


def capture(gradients: list[Tensor], basis: Basis) -> dict[str, list[float]]:
    """Arm -> captured share of each gradient (out, in) of one layer kind.

    Raises:
        UserError: for a one-sided basis.
    """
    basis.both()
    return {name: [round(share(G, basis), 5) for G in gradients] for name, share in ARMS.items()}
