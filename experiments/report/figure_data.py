"""Reading the data of a figure or table that `python -m experiments.studies.gradients` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad.errors import UserError
from sparsegrad.files import read_json


def read_figure_data(results: Path, name: str, *fields: str) -> dict[str, Any] | None:
    """The content of figures/NAME.json, or None if it was not measured.

    Args:
        results: the results folder.
        name: `figure2`, `figure3`, `basis` or `energy`.
        fields: that the caller needs.

    Raises:
        UserError: when it cannot be read, or lacks a field.
    """
    path = results / "figures" / f"{name}.json"
    if not path.is_file():
        return None
    remedy = f"make reproduce-{'quality' if name == 'energy' else name} measures it again"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    missing = [field for field in fields if not isinstance(found, dict) or field not in found]
    if missing or not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no {', '.join(missing) or 'JSON object'}): {remedy}")
    return found
