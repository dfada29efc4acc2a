"""The benchmark's files in results/bench."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench.results import SCHEMA, with_current_arms

# In the same folder, but not benchmarks: docs/several-gpus.md.
APART = ("bytes_per_step.json", "sharded.json")


def _files(results: Path) -> list[Path]:
    return [path for path in sorted((results / "bench").glob("*.json")) if path.name not in APART]


def documents(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of each readable benchmark file; `unread` lists the others."""
    for path in _files(results):
        found = _document(path)
        if isinstance(found, dict):
            yield path.stem, found


def unread(results: Path) -> list[str]:
    """One line for each benchmark file that is damaged or of another schema."""
    found = [(path, _document(path)) for path in _files(results)]
    return [f"bench/{path.name}: {reason}" for path, reason in found if isinstance(reason, str)]


def _document(path: Path) -> dict[str, Any] | str:
    """The content of a benchmark file, or the reason why it cannot be used."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"not a readable benchmark ({type(error).__name__})"
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
        return f"benchmark schema {schema}, this version reads {SCHEMA}"
    if "cells" not in found or "settings" not in found:
        return "not a benchmark: no cells or no settings"
    current: dict[str, Any] = with_current_arms(found)
    return current
