"""The search space: configuration keys and their possible values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sparsegrad.errors import UserError, check_integer, check_number, did_you_mean
from sparsegrad.runs.keys import flatten

_FORMS = "{float: [low, high], log: true}, {int: [low, high]} or {choice: [a, b]}"
_OPTIONS = {"float": {"log", "points"}, "int": {"log", "step"}, "choice": set()}  # allowed beside the values
_SCALAR_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched key.

    Attributes:
        key: dotted name in the configuration, such as `train.lr`.
        kind: `float`, `int` or `choice`.
        values: (low, high), both included, or the choices.
        log: whether the range is sampled uniformly in the logarithm.
        step: distance between the whole numbers that are tried.
        points: number of values of a float range in a grid; None: a grid over it is not possible.
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    log: bool = False
    step: int = 1
    points: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "choice":
            _check_choices(self.key, self.values)
        else:
            _check_range(self)

    @property
    def distribution(self) -> BaseDistribution:
        """The dimension as Optuna's distribution."""
        if self.kind == "choice":
            return CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind == "int":
            # Optuna allows no step together with log.
            return IntDistribution(low, high, log=self.log, step=1 if self.log else self.step)
        return FloatDistribution(low, high, log=self.log)

    @property
    def grid(self) -> list[Any]:
        """The values of this dimension in a grid.

        Raises:
            UserError: for a float range without `points`.
        """
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        if self.kind == "int":
            return list(range(low, high + 1, self.step))
        if self.points is None:
            raise UserError(
                f"sweep.space: {self.key} is a float range without points, which sweep.sampler=grid does not allow: "
                "add points: 5, give choices, or choose another sampler"
            )
        fractions = [index / (self.points - 1) for index in range(self.points)]
        if self.log:
            # Clamped: rounding could lead slightly outside the bounds.
            return [min(max(low * (high / low) ** fraction, low), high) for fraction in fractions]
        return [low + (high - low) * fraction for fraction in fractions]

    @property
    def ends(self) -> Sequence[Any]:
        """Values for which the configuration is checked: both ends of a range, or every choice."""
        return self.values

    def plain(self) -> dict[str, Any]:
        """Return the dimension as in YAML; studies are compared by it."""
        node: dict[str, Any] = {self.kind: list(self.values)}
        if self.log:
            node["log"] = True
        if self.step != 1:
            node["step"] = self.step
        if self.points is not None:
            node["points"] = self.points
        return node


@dataclass(frozen=True)
class Space:
    """All searched keys."""

    dimensions: tuple[Dimension, ...]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Key -> Optuna's distribution."""
        return {dimension.key: dimension.distribution for dimension in self.dimensions}

    def plain(self) -> dict[str, Any]:
        """Return the space as in YAML."""
        return {dimension.key: dimension.plain() for dimension in self.dimensions}

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of values; the last key changes fastest."""
        keys = [dimension.key for dimension in self.dimensions]
        return [dict(zip(keys, values, strict=True)) for values in product(*(one.grid for one in self.dimensions))]

    def probes(self) -> Iterator[dict[str, Any]]:
        """Yield each end of each key, one key at a time: the configuration must allow all of them."""
        for dimension in self.dimensions:
            for value in dimension.ends:
                yield {dimension.key: value}


def parse_space(node: Any, config: Mapping[str, Any]) -> Space:
    """Build the space that `sweep.space` describes.

    A dimension with `methods: [..]` is used for these methods only.

    Args:
        node: the value of `sweep.space`.
        config: the resolved configuration, which must contain the keys.

    Raises:
        UserError: for an unknown key, an empty range, a log range with a bound of 0 or less, or an empty choice.
    """
    if not isinstance(node, Mapping) or not node:
        raise UserError(f"sweep.space is empty: give at least one key, as {_FORMS}")
    method = config["method"]["name"]
    kept = {
        key: {option: value for option, value in entry.items() if option != "methods"}
        for key, entry in node.items()
        if _applies_to(key, entry, method)
    }
    if not kept:
        raise UserError(f"sweep.space has no key for method={method}: add one, or choose another method")
    for key in kept:
        _check_key(key, config)
    return Space(tuple(_make_dimension(key, entry) for key, entry in kept.items()))


def _applies_to(key: str, entry: Any, method: str) -> bool:
    if not isinstance(entry, Mapping):
        raise UserError(f"sweep.space: {key}={entry} is not understood: give {_FORMS}")
    methods = entry.get("methods")
    if methods is None:
        return True
    if not isinstance(methods, list) or not methods:
        raise UserError(f"sweep.space: {key} has methods={methods}: give a list of names such as [lora], or drop it")
    return method in methods


def _check_key(key: str, config: Mapping[str, Any]) -> None:
    known = list(flatten(config))
    if key not in known:
        hint = did_you_mean(key, known) or "see python run.py --help for the keys"
        raise UserError(f"sweep.space: the configuration has no value {key}; {hint}")


def _make_dimension(key: str, entry: Mapping[str, Any]) -> Dimension:
    kinds = [kind for kind in _OPTIONS if kind in entry]
    if len(kinds) != 1:
        raise UserError(f"sweep.space: {key}={entry} is not understood: give {_FORMS}")
    kind = kinds[0]
    unknown = set(entry) - {kind} - _OPTIONS[kind]
    if unknown:
        allowed = ", ".join(sorted(_OPTIONS[kind] | {"methods"}))
        raise UserError(
            f"sweep.space: {key} has {', '.join(sorted(unknown))}; a {kind} allows {allowed}: drop the rest"
        )
    values = entry[kind]
    if not isinstance(values, list | tuple):
        raise UserError(f"sweep.space: {key} has {kind}={values}: give {_FORMS}")
    options = {name: value for name, value in entry.items() if name != kind}
    return Dimension(key=key, kind=kind, values=tuple(values), **options)


def _check_choices(key: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise UserError(f"sweep.space: {key} has an empty choice: give at least one value")
    if not all(isinstance(value, _SCALAR_TYPES) for value in values):
        raise UserError(f"sweep.space: {key} has the choices {list(values)}: give numbers, words, true, false or null")
    if len({(type(value), value) for value in values}) < len(values):  # by type too: True == 1
        raise UserError(f"sweep.space: {key} has one choice twice: {list(values)}; drop one")


def _check_range(dimension: Dimension) -> None:
    where = f"sweep.space: {dimension.key}"
    if len(dimension.values) != 2:
        raise UserError(f"{where} has {dimension.kind}={list(dimension.values)}: give [low, high]")
    for value in dimension.values:
        if dimension.kind == "int":
            check_integer(where, value)
        else:
            check_number(where, value)
    low, high = dimension.values
    if not low < high:
        raise UserError(f"{where} has the empty range [{low}, {high}]: low must be below high")
    if dimension.log not in (True, False):
        raise UserError(f"{where} has log={dimension.log}: give true or false")
    if dimension.log and low <= 0:
        raise UserError(f"{where} has log: true and the bound {low}: give bounds above 0 for a logarithm")
    _check_options(where, dimension)


def _check_options(where: str, dimension: Dimension) -> None:
    check_integer(f"{where} step", dimension.step, at_least=1)
    if dimension.log and dimension.step != 1:
        raise UserError(f"{where} has both log and step: drop one")
    if dimension.points is not None:
        check_integer(f"{where} points", dimension.points, at_least=2)
    assert all(math.isfinite(value) for value in dimension.values)
