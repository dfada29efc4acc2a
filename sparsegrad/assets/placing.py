"""Put the files of an asset into its folder, where files of the user's own may lie: none of them is lost."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from sparsegrad.errors import UserError
from sparsegrad.files import load_json
from sparsegrad.hashing import file_sha256

_SHA256 = re.compile("[0-9a-f]{64}")


def check_place(folder: Path) -> None:
    """Raise `UserError` if there is something else than a folder in the place of an asset's folder."""
    if not os.path.lexists(folder) or folder.is_dir():
        return
    what, remedy = "a file", "rename it"
    if not folder.exists():  # it would only show after the download, when the folder cannot be created
        what, remedy = f"a link to {os.readlink(folder)}, which is not there", "create that folder, or remove the link"
    raise UserError(f"{folder} is {what}: {remedy}, or set SPARSEGRAD_ASSETS to another folder")


def read_note(path: Path) -> dict[str, str] | None:
    """File name -> sha256, as a conversion wrote it; None where `path` is missing, damaged or a file of another kind.

    Raises:
        OSError: if it exists but cannot be read.
    """
    if not path.is_file():
        return None
    try:
        made = load_json(path)
    except ValueError:
        return None
    ours = isinstance(made, dict) and made and all(_SHA256.fullmatch(str(sha256)) for sha256 in made.values())
    return made if ours else None


def place_files(new: Path, folder: Path, note: str | None, say: Callable[[str], None]) -> None:
    """Move each file of `new` into `folder`, one by one; whatever else is there stays.

    Args:
        new: a folder of files without subfolders.
        folder: created if needed.
        note: the file without which the asset counts as incomplete: it goes first and comes last. None: there is none.
        say: prints one line for each file in the way, which is kept under another name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if note is not None and read_note(folder / note) is not None:
        (folder / note).unlink()
    for file in sorted(new.iterdir(), key=lambda path: path.name == note):
        place = folder / file.name
        if not _have_same_content(place, file):
            _place(file, place, say)


def _place(file: Path, place: Path, say: Callable[[str], None]) -> None:
    """Move one file. `place` may be on another disk: a copy that is killed must not have the name of the whole file."""
    waiting = place.with_name(f".{place.name}.fetched.tmp")
    try:
        shutil.move(file, waiting)
        if os.path.lexists(place):  # a damaged file, or one of the user's own
            kept = _find_free(place)
            place.rename(kept)
            say(f"{place} had other content, which is now in {kept.name}")
        waiting.rename(place)
    finally:
        with suppress(OSError):
            waiting.unlink()


def _have_same_content(one: Path, other: Path) -> bool:
    return one.is_file() and one.stat().st_size == other.stat().st_size and file_sha256(one) == file_sha256(other)


def _find_free(path: Path) -> Path:
    """`<name>.old`, or with a number if that is taken."""
    names = (path.with_name(f"{path.name}.old{number or ''}") for number in count())
    return next(name for name in names if not os.path.lexists(name))
