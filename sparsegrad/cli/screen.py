"""Text that every console can show."""

from __future__ import annotations

import io
import sys


def replace_unprintable() -> None:
    """Print characters that the console's encoding lacks as escapes, such as \\xe9, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook or a test has its own kind
            stream.reconfigure(errors="backslashreplace")
