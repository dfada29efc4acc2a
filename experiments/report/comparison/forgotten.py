"""The results of `make forgetting` on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad.errors import UserError
from sparsegrad.files import read_json

FOLDER = Path("compare") / "forgetting"


def read_forgetting(results: Path) -> dict[str, dict[str, Any]]:
    """Key of a run -> its losses `before` and `after`, all measured on the same texts.

    Raises:
        UserError: for a damaged result, or results of different texts.
    """
    found = {path: _read_result(path) for path in sorted((results / FOLDER).glob("*.json"))}
    first = next(iter(found), None)
    for path, one in found.items():
        if first is not None and describe_texts(one) != describe_texts(found[first]):
            raise UserError(
                f"{path} was measured with {describe_texts(one)}, {first.name} with {describe_texts(found[first])}: "
                f"delete {results / FOLDER} and run make forgetting again"
            )
    return {path.stem: one for path, one in found.items()}


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
        float(found["before"]), float(found["after"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a result of make forgetting ({error!r}): delete it, and run it again") from None
    return found


def describe_texts(about: Mapping[str, Any]) -> str:
    """On which texts a result was measured."""
    return f"TEXTS of hash {about.get('texts')}, --rows {about.get('rows')} --tokens {about.get('tokens')}"
