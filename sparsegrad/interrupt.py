"""While a command of this project still imports, Ctrl-C and a missing package end it with one line, not a traceback.

`sparsegrad/__init__.py` imports this module first. In a program of a user's own it does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from sparsegrad.extras import explain_missing


def is_command(words: Sequence[str]) -> bool:
    """Whether the words of a process, as in `sys.orig_argv`, start a command of this project."""
    if "-m" in words[:-1]:
        module = words[words.index("-m") + 1]
        return module.split(".")[0] in ("sparsegrad", "experiments")
    return any(Path(word).stem == "sparsegrad" for word in words[:2])  # the console script, with or without Python


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and (text := explain_missing(error)):
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2)  # otherwise Python would exit with 1
    else:
        sys.__excepthook__(kind, error, trace)


if is_command(sys.orig_argv):
    sys.excepthook = _end_in_one_line
    if not any(word.startswith("experiments") for word in sys.orig_argv):  # the benchmark measures torch as it is
        # As run.py does: threads that wait give up their core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
