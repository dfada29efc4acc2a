"""Whether the disk holds a large asset: said before the download, which takes minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sparsegrad.assets.table import Asset
from sparsegrad.errors import UserError


def check_disk(asset: Asset, root: Path, say: Callable[[str], None]) -> None:
    """Say how much disk an asset needs, in `root` and, where its own folder is a link to another disk, there too.

    Args:
        asset: nothing is said or checked where its `disk` is 0.
        root: the folder of all assets; it may not exist yet.
        say: prints one line per disk.

    Raises:
        UserError: if less is free, with both numbers.
    """
    if not asset.disk:
        return
    free = shutil.disk_usage(_find_existing(root)).free
    say(f"{asset.name}: needs {format_size(asset.disk)} of disk while it is fetched, {format_size(free)} are free")
    if free < asset.disk:
        raise _refuse(asset, asset.disk, root, free, "set SPARSEGRAD_ASSETS to a folder on another disk")
    own = (root / asset.name).resolve()
    if own.exists() and _is_other_disk(own, root):
        free = shutil.disk_usage(own).free
        say(f"{asset.name}: needs {format_size(asset.stored)} in {own}, {format_size(free)} are free")
        if free < asset.stored:
            raise _refuse(asset, asset.stored, own, free, f"link {root / asset.name} to a folder on another disk")


def _refuse(asset: Asset, needed: int, folder: Path, free: int, otherwise: str) -> UserError:
    return UserError(
        f"asset {asset.name}: needs {format_size(needed)} in {folder}, but only {format_size(free)} are free: "
        f"free some space, or {otherwise}"
    )


def _is_other_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev != other.stat().st_dev


def _find_existing(folder: Path) -> Path:
    return next((one for one in (folder, *folder.parents) if one.exists()), Path.cwd())


def format_size(size: int) -> str:
    """A number of bytes in decimal units, as pip writes it, such as `1.3 GB`, `84 MB` or `79 kB`."""
    if size >= 100_000_000:
        return f"{size / 1e9:.1f} GB"
    unit, name = (1e6, "MB") if size >= 1_000_000 else (1e3, "kB")
    number = size / unit
    return f"{number:.0f} {name}" if number >= 10 else f"{number:.1f} {name}"
