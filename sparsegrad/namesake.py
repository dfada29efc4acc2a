"""Refuse to run beside the other distribution called `sparsegrad`, whose files would mix with ours.

PyPI has had a `sparsegrad` for sparse Jacobians since 2016; this project is distributed as `sparsegrad-peft`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata


def refuse_namesake() -> None:
    """Raise `ImportError` if the other `sparsegrad` is installed in this environment."""
    try:
        summary = metadata("sparsegrad")["Summary"] or ""
    except PackageNotFoundError:
        return
    if "Jacobian" in summary:
        raise ImportError(
            "another project's package `sparsegrad` (sparse Jacobians) is installed here and has the same import name: "
            "run `pip uninstall sparsegrad`, then install this one again (`pip install -e .` in its checkout)"
        )


refuse_namesake()
