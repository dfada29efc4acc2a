"""Whether the disk holds a large asset: said before the download, which takes minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sparsegrad.assets.table import Asset
from sparsegrad.errors import UserError


def check_disk(asset: Asset, root: Path, say: Callable[[str], None]) -> None:
    """Say how much disk an asset needs.

    Args:
        asset: nothing is said or checked where its `disk` is 0.
        root: the folder of all assets; it may not exist yet.
        say: prints one line.

    Raises:
        UserError: if less is free, with both numbers.
    """
    if not asset.disk:
        return
    there = next((folder for folder in (root, *root.parents) if folder.exists()), Path.cwd())
    free = shutil.disk_usage(there).free
    say(f"{asset.name}: needs {format_size(asset.disk)} of disk while it is fetched, {format_size(free)} are free")
    if free < asset.disk:
        raise UserError(
            f"asset {asset.name}: needs {format_size(asset.disk)} in {root}, but only {format_size(free)} are free: "
            "free some space, or set SPARSEGRAD_ASSETS to a folder on another disk"
        )


def format_size(size: int) -> str:
    """A number of bytes in decimal units, as pip writes it, such as `1.3 GB`, `84 MB` or `79 kB`."""
    if size >= 100_000_000:
        return f"{size / 1e9:.1f} GB"
    unit, name = (1e6, "MB") if size >= 1_000_000 else (1e3, "kB")
    number = size / unit
    return f"{number:.0f} {name}" if number >= 10 else f"{number:.1f} {name}"
