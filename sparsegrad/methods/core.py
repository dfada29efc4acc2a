"""A linear whose change is a small trained core between two frozen factors; `lora_xs` and `lora_sb` choose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import floor

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError, check_integer, fail
from sparsegrad.layers.common import check_linear, make_linear
from sparsegrad.layers.replace import replace_linear, replace_module
from sparsegrad.methods.base import Context, Prepared, adamw, freeze, trainable_parameters, widen_linear
from sparsegrad.optim.selection import check_density
from sparsegrad.targets import Linears, all_linears, weight_shapes

Factors = tuple[Tensor, Tensor, Tensor]
"""B (out, r), R (r, r) and A (r, in): the change of the weight is B R A."""


class CoreLinear(nn.Module):
    """y = x (W + B R A)^T + b. Only the core R (r, r) trains; the bias does if that of the linear did."""

    A: Tensor
    B: Tensor

    def __init__(self, linear: nn.Linear, B: Tensor, R: Tensor, A: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("A", A.to(linear.weight).contiguous())
        self.register_buffer("B", B.to(linear.weight).contiguous())
        # At least float32, so that small steps are not lost to rounding.
        self.core = nn.Parameter(R.to(torch.promote_types(linear.weight.dtype, torch.float32)).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out)."""
        change = nn.functional.linear(nn.functional.linear(nn.functional.linear(x, self.A), self.core), self.B)
        return nn.functional.linear(x, self.weight, self.bias) + change

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ordinary linear that computes the same function, of the dtype of the core (see `widen_linear`)."""
        dtype = self.core.dtype
        weight = self.weight.to(dtype) + self.B.to(dtype) @ self.core @ self.A.to(dtype)
        linear = make_linear(nn.Parameter(weight, requires_grad=False), self.bias)
        widen_linear(linear)
        return linear


def check_size(density: float | None, rank: int | None) -> None:
    """Check that one of `method.density` and `method.rank` is given and in range."""
    if (density is None) == (rank is None):
        raise UserError(f"method.density={density} and method.rank={rank}: give one and set the other to null")
    if rank is not None:
        check_integer("method.rank", rank, at_least=1)
    check_density(density)


def find_ranks(linears: Linears, density: float | None, rank: int | None) -> dict[str, int]:
    """Layer kind -> rank r of its cores: the given one, or that whose r^2 is closest to `density` of the entries.

    Raises:
        UserError: for a rank of 0, or above the smaller side of a weight.
    """
    ranks = {}
    shapes = weight_shapes(linears)
    for kind, (rows, columns) in shapes.items():
        if density is None:
            ranks[kind] = check_integer("method.rank", rank, at_least=1, at_most=min(rows, columns))
            continue
        ranks[kind] = round(density**0.5 * (rows * columns) ** 0.5)
        if ranks[kind] < 1:
            raise UserError(
                f"method.density={density} makes the rank of {kind} 0: give at least {1 / (rows * columns):.1g}"
            )
        if ranks[kind] > min(rows, columns):
            narrowest = min(min(shape) / max(shape) for shape in shapes.values())  # so that the remedy fits all kinds
            why = f"the rank of {kind} would be {ranks[kind]}, and a weight {(rows, columns)} has {min(rows, columns)}"
            raise fail("method.density", density, why, f"give at most {floor(narrowest * 1e4) / 1e4}")
    return ranks


def count_cores(linears: Linears, ranks: Mapping[str, int]) -> int:
    """Entries of all cores."""
    return sum(ranks[kind] ** 2 * len(found) for kind, found in linears.items())


def prepare_cores(
    model: nn.Module, linears: Linears, context: Context, make_factors: Callable[[str, str, nn.Linear], Factors]
) -> Prepared:
    """Replace the linears by `CoreLinear`s and freeze what a method with cores freezes.

    Args:
        model: changed in place.
        linears: layer kind -> name -> linear of `model`.
        context: what the run hands in.
        make_factors: kind, name and linear -> its factors.
    """
    for linear in all_linears(linears):
        check_linear(linear, "a core", "use method=sparsegrad")
    freeze(model, linears, context, mlp_weights=False)
    layers: dict[str, CoreLinear] = {}
    for kind, found in linears.items():
        for name, linear in found.items():
            layers[name] = CoreLinear(linear, *make_factors(kind, name, linear))
            replace_linear(model, name, linear, layers[name])
    parameters = trainable_parameters(model)
    return Prepared(
        optimizer=adamw(parameters, context),
        trainable=sum(parameter.numel() for parameter in parameters),
        trainable_per_weight={kind: layers[next(iter(found))].core.numel() for kind, found in linears.items()},
        finish=partial(_merge, model, layers),
    )


def _merge(model: nn.Module, layers: dict[str, CoreLinear]) -> None:
    for name, layer in layers.items():
        replace_module(model, name, layer.to_linear())
