"""While a command of this project still imports, Ctrl-C and a missing package end it with one line, not a traceback.

`sparsegrad/__init__.py` imports this module first. In a program of a user's own it does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from sparsegrad.extras import ROOT, explain_missing


def is_command(words: Sequence[str], script: str | None = None) -> bool:
    """Whether a process runs a command of this project.

    Args:
        words: its command line, as in `sys.orig_argv`.
        script: the file that Python runs, if it runs one; torchrun starts run.py behind words of its own.
    """
    if script is not None and Path(script).resolve() == ROOT / "run.py":
        return True
    if module := _find_module(words):
        return module.split(".")[0] in ("sparsegrad", "experiments")
    return any(Path(word).stem == "sparsegrad" for word in words[:2])  # the console script, with or without Python


def _find_module(words: Sequence[str]) -> str:
    """The module of Python's own `-m`, else empty: what follows a script, or the code of `-c`, are its own words."""
    for before, word in pairwise(words):
        if before == "-m":
            return word
        is_script = not word.startswith("-") and before not in ("-W", "-X")  # these have a value
        if is_script or before in ("-c", "-"):
            return ""
    return ""


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130)
    if isinstance(error, ModuleNotFoundError) and (text := explain_missing(error)):
        if os.environ.get("RANK", "0") == "0":  # torchrun starts several of the same process
            print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2)  # otherwise Python would exit with 1
    sys.__excepthook__(kind, error, trace)


if is_command(sys.orig_argv, getattr(sys.modules["__main__"], "__file__", None)):
    sys.excepthook = _end_in_one_line
    if not _find_module(sys.orig_argv).startswith("experiments"):  # the benchmark measures torch as it is
        # Before torch is imported: threads that wait give up their core, so that two runs side by side do not slow each
        # other down tenfold. A value of the user's own stays.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
