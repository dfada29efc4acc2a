"""What a source file imports, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path


def imported_names(path: Path) -> list[str]:
    """The dotted name of every module or member that a file imports, wherever in it.

    `from sparsegrad.runs import records` names a module, `from sparsegrad.runs.records import x` does too.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the full name of the module"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
