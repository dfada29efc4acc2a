"""One run: configuration in, record out.

`config.py` reads the configuration, `preflight.py` checks it, and `runner.py` has the steps of a run.
"""

from __future__ import annotations

from typing import Any

from sparsegrad.runs.open_nodes import register

register()  # before Hydra composes: run.py imports this package first


def __getattr__(name: str) -> Any:
    """`sparsegrad.runs.run`; imported when it is asked for, since it brings in transformers and datasets."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsegrad.runs.runner import run

    return run
