"""Reading the data of a figure or table that `python -m experiments.studies.gradients` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad.errors import UserError
from sparsegrad.files import load_json, unreadable

# File -> what it measured.
_MEASURED = {"figure2": "kinds", "figure3": "shares", "basis": "rows", "energy": "rows"}


def read_figure_data(results: Path, name: str) -> dict[str, Any] | None:
    """The content of figures/NAME.json, or None if it was not measured.

    Args:
        results: the results folder.
        name: `figure2`, `figure3`, `basis` or `energy`.

    Raises:
        UserError: when it cannot be read, or lacks what it measured.
    """
    path = results / "figures" / f"{name}.json"
    if not path.is_file():
        return None
    remedy = f"make reproduce-{'quality' if name == 'energy' else name} measures it again"
    try:
        found = load_json(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(found, dict) or not found.get(_MEASURED[name]):
        raise UserError(f"{path} is damaged (no {_MEASURED[name]}): {remedy}")
    return found
