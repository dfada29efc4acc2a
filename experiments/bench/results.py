"""The results file: reading it, adding cells, and summarising it. Its schema is in `bench/__main__.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.arithmetic import Linear, relative_speed
from experiments.bench.arms import ARMS, REFERENCES, lora_rank
from experiments.bench.settings import Setting
from sparsegrad.errors import UserError
from sparsegrad.layers.block import core_shape

SCHEMA = 1
Document = dict[str, Any]
# Earlier names of arms, in results measured before the engines were renamed.
_EARLIER_ARMS = {
    "merged": "exact",
    **{f"merged_{name}": f"exact_{name}" for name in ("release", "drop", "bf16", "small", "lean")},
}


def empty() -> Document:
    """A document without measurements."""
    return {"schema": SCHEMA, "settings": {}, "cells": [], "calibrations": {}, "decompositions": {}}


def read(path: Path) -> Document:
    """The document at `path`, or an empty one if there is no file.

    Raises:
        UserError: when the file is damaged or of another schema.
    """
    if not path.exists():
        return empty()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable results file ({error}): delete it, or choose another --out"
        ) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}: choose another --out")
    current: Document = with_current_arms(document)
    return current


def with_current_arms(node: Any) -> Any:
    """The same document with the current names of arms: in keys, in values of `arm`, and in descriptions of bars."""
    if isinstance(node, dict):
        return {_EARLIER_ARMS.get(key, key): _current_value(key, value) for key, value in node.items()}
    return [with_current_arms(item) for item in node] if isinstance(node, list) else node


def _current_value(key: str, value: Any) -> Any:
    if key == "arm":
        return _EARLIER_ARMS.get(value, value)
    if key == "bar":
        return value.replace("merged", "exact", 1) if value.startswith("merged") else value
    return with_current_arms(value)


def find_cell(document: Document, setting: str, arm: str, repeat: int) -> dict[str, Any] | None:
    """The cell of a setting, arm and repeat, or None."""
    cells = (cell for cell in document["cells"] if _identity(cell) == (setting, arm, repeat))
    return next(cells, None)


def is_final(cell: dict[str, Any] | None) -> bool:
    """Whether a measurement is not to be repeated: it is complete, or failed for lack of memory, as it would again.

    Any other failure, such as a timeout or a killed process, says nothing about the arm.
    """
    return cell is not None and (cell["status"] == "complete" or "memory" in cell["reason"])


def put_cell(document: Document, cell: dict[str, Any]) -> None:
    """Add a cell; it replaces one of the same setting, arm and repeat."""
    document["cells"] = [old for old in document["cells"] if _identity(old) != _identity(cell)] + [cell]


def describe(setting: Setting) -> dict[str, Any]:
    """A setting as JSON, with the predicted ratio of steps/s of each arm to each reference."""
    linears = mlp_of(setting)
    predicted = {
        reference: {
            arm: round(relative_speed(found.cost, linears, ARMS[reference].cost), 3) for arm, found in ARMS.items()
        }
        for reference in REFERENCES
    }
    return {**setting.as_json(), "lora_rank": lora_rank(setting), "predicted": predicted}


def mlp_of(setting: Setting) -> list[Linear]:
    """The two linears of an MLP in this setting."""
    hidden, intermediate = setting.widths
    return [_linear(hidden, intermediate, setting), _linear(intermediate, hidden, setting)]


def summarise(document: Document) -> dict[str, dict[str, Any]]:
    """Setting -> arm -> medians, and ratios to each reference that was measured in the same repeat."""
    return {
        key: {arm: _summarise_arm(document, key, arm) for arm in _arms(document, key)} for key in document["settings"]
    }


def _summarise_arm(document: Document, setting: str, arm: str) -> dict[str, Any]:
    cells = list(complete(document, setting, arm))
    failed = [cell["reason"] for cell in document["cells"] if _identity(cell)[:2] == (setting, arm) and _failed(cell)]
    pairs = {reference: list(_pairs(document, setting, arm, reference)) for reference in REFERENCES}
    return {
        "steps_per_second": spread(cell["steps_per_second"] for cell in cells),
        "peak_mib": spread(cell["peak_mib"] for cell in cells),
        "speed": {
            name: spread(a["steps_per_second"] / b["steps_per_second"] for a, b in pairs[name]) for name in pairs
        },
        "memory": {
            name: spread(a["peak_mib"] / b["peak_mib"] for a, b in pairs[name] if b["peak_mib"]) for name in pairs
        },
        "steps": sum(cell["steps"] for cell in cells),
        "failed": failed[:1],
    }


def _pairs(document: Document, setting: str, arm: str, reference: str) -> Iterator[tuple[Any, Any]]:
    """Cells of the arm and of the reference from the same repeat, if they ran the same number of steps."""
    others = {cell["repeat"]: cell for cell in complete(document, setting, reference)}
    for cell in complete(document, setting, arm):
        other = others.get(cell["repeat"])
        # Fewer steps mean other batches, so such cells are not comparable.
        if other is not None and other["steps"] == cell["steps"]:
            yield cell, other


def complete(document: Document, setting: str, arm: str) -> Iterator[dict[str, Any]]:
    """The complete cells of an arm in a setting."""
    for cell in document["cells"]:
        if _identity(cell)[:2] == (setting, arm) and not _failed(cell):
            yield cell


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median, minimum, maximum and count; None for no values."""
    found = sorted(values)
    if not found:
        return None
    middle = {"median": median(found), "min": found[0], "max": found[-1]}
    return {**{name: round(value, 4) for name, value in middle.items()}, "n": len(found)}


def _linear(n: int, m: int, setting: Setting) -> Linear:
    rows, columns = core_shape((m, n), setting.density)
    return Linear(n=n, m=m, T=setting.tokens, c=rows, r=columns, s=lora_rank(setting))


def _arms(document: Document, setting: str) -> list[str]:
    """Arms that have cells, in the order of `ARMS`; arms that no longer exist come last."""
    found = {cell["arm"] for cell in document["cells"] if cell["setting"] == setting}
    return [arm for arm in ARMS if arm in found] + sorted(found - set(ARMS))


def _identity(cell: dict[str, Any]) -> tuple[str, str, int]:
    return cell["setting"], cell["arm"], cell["repeat"]


def _failed(cell: dict[str, Any]) -> bool:
    return bool(cell["status"] != "complete")
