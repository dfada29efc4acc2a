"""The types of peft's fields, from the annotations of its configuration classes.

peft does not check most of them: text for a rank fails somewhere inside, in words that do not name the field.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, Literal, Union

from sparsegrad.errors import fail

# Kind of value -> what a message calls it. The kinds of JSON, with whole numbers apart.
_WORDS = {
    "integer": "a whole number", "number": "a number", "bool": "true or false", "text": "a text", "list": "a list",
    "mapping": "a mapping such as {name: value}", "null": "null",
}  # fmt: skip
_KINDS: dict[Any, str] = {
    int: "integer", float: "number", bool: "bool", str: "text", list: "list", tuple: "list", set: "list",
    dict: "mapping", type(None): "null",
}  # fmt: skip
# Of values; the first that fits, as a truth value is a whole number too.
_CLASSES: dict[str, Any] = {
    "null": type(None), "bool": bool, "integer": Integral, "number": Real, "text": str, "mapping": Mapping,
    "list": (Sequence, Set),
}  # fmt: skip
_REAL = ("alpha", "lambda")  # ends of fields that peft calls whole numbers but multiplies with


def check_types(config_class: type[Any], node: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first value of `node` that is of another type than peft's field."""
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # an annotation that only type checkers can read
        return
    for name, value in node.items():
        kinds = _list_kinds(hints.get(name, Any))
        if "integer" in kinds and name.endswith(_REAL):
            kinds = ["number" if kind == "integer" else kind for kind in kinds]
        # peft takes these two for every initialisation, whatever the annotation says.
        further = ["bool", "null"] if name.startswith("init") else []
        if None not in kinds and not _fits(value, [*kinds, *further]):
            allowed = " or ".join(dict.fromkeys(_WORDS[str(kind)] for kind in kinds))
            raise fail(f"method.config.{name}", _show(value), f"give {allowed}")


def _list_kinds(hint: Any) -> list[str | None]:
    """The kinds of value that an annotation allows; None among them stands for anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return [kind for one in arguments for kind in _list_kinds(one)]
    if origin is Literal:  # not its values: peft's own lists of them lag behind
        return [_KINDS.get(type(one)) for one in arguments]
    return [_KINDS.get(origin or hint)]


def _fits(value: Any, kinds: list[str | None]) -> bool:
    kind = next((name for name, one in _CLASSES.items() if isinstance(value, one)), None)
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _show(value: Any) -> Any:
    """As messages show it: text that looks like a number in quotes, as it is the quotes that are wrong."""
    is_number_like = isinstance(value, str) and value.replace(".", "", 1).isdecimal()
    return "null" if value is None else repr(value) if is_number_like else value
