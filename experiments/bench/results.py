"""The results file: reading it, adding cells, and summarising it. Its schema is in `bench/__main__.py`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.arithmetic import Linear, relative_speed
from experiments.bench.arms import ARMS, REFERENCES, lora_rank
from experiments.bench.settings import Setting
from sparsegrad.errors import UserError
from sparsegrad.files import unreadable
from sparsegrad.layers.common import core_shape

SCHEMA = 1
Cell = Mapping[str, Any]
Document = dict[str, Any]
OUT_OF_MEMORY = "out of memory"  # a reason that the process gave itself begins with it
MIXED = " †"  # follows a ratio of two arms that different commits measured
ABOUT_MIXED = (
    "†: the two methods of this ratio were measured by different commits, in separate calls; slow drift of the machine "
    "may be part of it."
)
NO_BASES = "no calibration: "  # precedes the reason of a calibration, in the cells that needed its bases
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
        UserError: when the file cannot be read, is damaged or of another schema.
    """
    if not path.exists():
        return empty()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
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
    """Whether a measurement is not to be repeated: it is complete, or failed for lack of GPU memory, as it would again.

    Any other failure, such as a timeout, a killed process or a crash of CUDA, says nothing about the arm.
    """
    if cell is None:
        return False
    if cell["status"] == "complete":
        return True
    reason: str = cell["reason"]
    # A reason that only contains these words is another failure: for a killed process, for example, they are a guess.
    return reason.removeprefix(NO_BASES).startswith(OUT_OF_MEMORY)


def drop_cells(document: Document, setting: str, arms: Collection[str]) -> None:
    """Remove the cells of these arms in a setting."""
    document["cells"] = [cell for cell in document["cells"] if cell["setting"] != setting or cell["arm"] not in arms]


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
    others = {reference: list(complete(document, setting, reference)) for reference in REFERENCES}
    return {
        "steps_per_second": spread(cell["steps_per_second"] for cell in cells),
        "peak_mib": spread(cell["peak_mib"] for cell in cells),
        "speed": {name: _spread_ratios(cells, of, "steps_per_second") for name, of in others.items()},
        "memory": {name: _spread_ratios(cells, of, "peak_mib") for name, of in others.items()},
        "steps": sum(cell["steps"] for cell in cells),
        "failed": failed[:1],
    }


def _spread_ratios(cells: Sequence[Cell], others: Sequence[Cell], field: str) -> dict[str, float] | None:
    """As `spread`, and `mixed`: the number of ratios whose two cells are of different commits, if there are any."""
    found, mixed = spread(repeat_ratios(cells, others, field)), count_mixed(cells, others, field)
    return {**found, "mixed": mixed} if found and mixed else found


def repeat_ratios(cells: Iterable[Cell], others: Iterable[Cell], field: str) -> list[float]:
    """`field` of an arm divided by that of another arm, in each repeat in which both ran the same number of steps.

    In one call of the benchmark the arms of a repeat are measured one after the other, so that slow drift of the
    machine cancels. Nothing guarantees the same load: it may change from one process to the next, and a cell that was
    missing or had failed is measured by a later call, perhaps with other code: `count_mixed` tells.

    Args:
        cells, others: cells of the two arms in one setting; those that failed are left out.
        field: `steps_per_second` or `peak_mib`. A repeat in which the other arm's is 0 has no ratio.
    """
    return [cell[field] / other[field] for cell, other in _pair_repeats(cells, others, field)]


def count_mixed(cells: Iterable[Cell], others: Iterable[Cell], field: str) -> int:
    """Number of the ratios of `repeat_ratios` whose cells were measured by different commits."""
    return sum(cell.get("commit") != other.get("commit") for cell, other in _pair_repeats(cells, others, field))


def mark_mixed(mixed: int, repeats: int) -> str:
    """What follows a ratio of which so many of its repeats are of different commits; empty if none is."""
    if not mixed:
        return ""
    return MIXED if mixed == repeats else f"{MIXED} ({mixed} of {repeats} repeats)"


def _pair_repeats(cells: Iterable[Cell], others: Iterable[Cell], field: str) -> list[tuple[Cell, Cell]]:
    """Cells of the same repeat and number of steps: fewer steps mean other batches, which are not comparable."""
    of = {cell["repeat"]: cell for cell in others if not _failed(cell)}
    pairs = [(cell, of[cell["repeat"]]) for cell in cells if not _failed(cell) and cell["repeat"] in of]
    return [(cell, other) for cell, other in pairs if cell["steps"] == other["steps"] and other[field]]


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


def _identity(cell: Cell) -> tuple[str, str, int]:
    return cell["setting"], cell["arm"], cell["repeat"]


def _failed(cell: Cell) -> bool:
    return bool(cell["status"] != "complete")
