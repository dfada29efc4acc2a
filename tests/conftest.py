"""Where the tests write: in memory, where there is room for it.

Runs and searches sync what they write. On a disk that takes its time the suite waits as long as it computes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
NEEDED_BYTES = 4 << 30


def pytest_configure() -> None:
    """Choose the folder before pytest and the first test make files; processes that tests start inherit it."""
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return
    if shutil.disk_usage(MEMORY).free >= NEEDED_BYTES:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # what was found before
