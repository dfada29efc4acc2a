"""`python -m experiments.report NAME`: see `experiments.report.command`, whose imports take seconds."""

from __future__ import annotations

import sys

from sparsegrad.errors import run_as_command
from sparsegrad.progress import job


def _start() -> int:
    with job("starting"):
        from experiments.report.command import main
    return main()


if __name__ == "__main__":
    sys.exit(run_as_command(_start, "interrupted: the same command makes the rest"))
