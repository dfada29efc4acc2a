"""The screen: what `run.py` and the command `sparsegrad` print, and their exit status.

`entry.py` starts run.py, and `console.py` the command `sparsegrad`.
"""

from __future__ import annotations

from typing import Any

from sparsegrad.cli.screen import replace_unprintable

__all__ = ["replace_unprintable", "run_command"]  # noqa: F822 - the second comes from `__getattr__`


def __getattr__(name: str) -> Any:
    """`sparsegrad.cli.run_command`; imported when it is asked for, since it needs the extra `run`."""
    if name != "run_command":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsegrad.cli.running import run_command

    return run_command
