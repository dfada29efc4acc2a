"""The temporary folder of a download in the folder of all assets, and the removal of those that killed ones left."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparsegrad.assets.table import ASSETS, Asset
from sparsegrad.files import is_of_writing, unwritable

_LOCK = "running.lock"  # in each folder; a running download holds it
_OTHERWISE = ", with SPARSEGRAD_ASSETS"
_YOUNG_SECONDS = 3600.0  # a younger folder may belong to a download that does not hold its lock yet


@contextmanager
def make_scratch(asset: Asset, root: Path) -> Iterator[Path]:
    """Create a temporary folder in `root`: on the same file system, so that files can be renamed into place.

    Raises:
        ResourceError: if `root` cannot be written, also later, as when the disk becomes full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_left(root)
        scratch = Path(tempfile.mkdtemp(prefix=f".{asset.name}.", suffix=".tmp", dir=root))
    except OSError as error:
        raise unwritable(root, error, _OTHERWISE) from None
    try:
        with FileLock(scratch / _LOCK):
            yield scratch
    except Exception as error:
        if not is_of_writing(error, (root,)):
            raise
        raise unwritable(root, error, _OTHERWISE) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_left(root: Path) -> None:
    """Remove the folders of killed downloads, and nothing else: `root` may hold folders of the user's own."""
    for name in ASSETS:
        for folder in root.glob(f".{name}.*.tmp"):
            if _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether a download was killed: nobody holds the lock. Age alone says nothing, as a long one is old too."""
    try:
        if not (folder / _LOCK).is_file() or time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
            return False
        with FileLock(folder / _LOCK, timeout=0):
            return True
    except (OSError, Timeout):  # another process has just removed it, or holds the lock
        return False
