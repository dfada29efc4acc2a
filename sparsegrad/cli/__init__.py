"""The screen: what `run.py` and the command `sparsegrad` print, and their exit status."""

from sparsegrad.cli.running import run_command
from sparsegrad.cli.screen import replace_unprintable

__all__ = ["replace_unprintable", "run_command"]
