"""A toy asset: packages in memory, and downloads that give them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad.assets import download as assets
from sparsegrad.assets.table import ASSETS, Asset, AssetFile

CONTENT = {"a.txt": b"first", "b.bin": b"\x00second"}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(extra: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in ({f"pkg/{name}": data for name, data in CONTENT.items()} | (extra or {})).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarball(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


Toy = Callable[..., Asset]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Toy:
    """Puts an asset `toy` for given package bytes into the table; the root is tmp_path/root."""
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "root"))
    assets._verified.cache_clear()

    def add(package: bytes, inner: str | None = None, folder: str = "pkg", **files: str) -> Asset:
        wanted = files or {name: sha(data) for name, data in CONTENT.items()}
        members = tuple(AssetFile(f"{folder}/{name}", digest) for name, digest in wanted.items())
        toy = Asset("toy", "a toy", "MIT", "nowhere", "toy-pkg", "1.0", sha(package), members, inner)
        monkeypatch.setitem(ASSETS, "toy", toy)
        return toy

    return add


def giving(package: bytes) -> assets.Download:
    def download(asset: Asset, folder: Path) -> Path:
        (folder / "toy.whl").write_bytes(package)
        return folder / "toy.whl"

    return download


def offline(asset: Asset, folder: Path) -> Path:
    raise AssertionError("nothing may be downloaded")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if _is_content(path)}


def names(root: Path) -> list[str]:
    """What is in `root`, without the lock of a download, which stays."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def _is_content(path: Path) -> bool:
    return path.is_file() and path.suffix != ".lock"
