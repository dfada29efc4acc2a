"""Assets: only what is pinned gets in, whole or not at all, and every failure says what to do."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asset_cases import CONTENT, Toy, contents, giving, names, offline, sha, tarball, wheel
from asset_cases import toy as toy  # the fixture
from filelock import FileLock

from sparsegrad.assets import download as assets
from sparsegrad.assets import placing, scratch
from sparsegrad.assets.table import ASSETS, Asset, AssetFile
from sparsegrad.errors import ResourceError, UserError


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
        patch.setattr(assets, "place_files", killed)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(["toy"], download=giving(wheel()))
    assert names(tmp_path / "root") == []
    assets.fetch(["toy"], download=giving(wheel()))
    assert assets.asset_path("toy").is_dir()


def test_only_old_leftovers_of_killed_fetches_are_removed(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    folders_of = {
        "killed": ".toy.1.tmp",
        "running": ".toy.2.tmp",
        "young": ".toy.3.tmp",
        "mine": ".notes.tmp",
        "own": ".toy.own.tmp",
    }
    folders = {what: tmp_path / "root" / name for what, name in folders_of.items()}
    for what, folder in folders.items():
        (folder / "files").mkdir(parents=True)
        if what != "own":
            (folder / scratch._LOCK).touch()
        if what != "young":
            os.utime(folder, (time.time() - 7200,) * 2)
    with FileLock(folders["running"] / scratch._LOCK):
        assets.fetch(["toy"], download=giving(wheel()))
    assert [what for what, folder in folders.items() if not folder.exists()] == ["killed"]


def test_a_running_fetch_holds_a_lock_that_ends_with_it(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())

    def long(asset: Asset, folder: Path) -> Path:
        os.utime(folder.parent, (time.time() - 7200,) * 2)
        assets.fetch(["toy"], download=giving(wheel()))
        assert folder.is_dir(), "another process fetches meanwhile"
        return giving(wheel())(asset, folder)

    assets.fetch(["toy"], download=long)
    assert names(tmp_path / "root") == ["toy"]


def test_a_file_that_cannot_be_read_is_not_called_corrupt(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(wheel())
    assets.fetch(["toy"], download=giving(wheel()))

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(assets, "file_sha256", fail)
    with pytest.raises(ResourceError, match=r"cannot read .*a\.txt \(Input/output error\): nothing was deleted"):
        assets.fetch(["toy"], download=offline)


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
    assert names(tmp_path / "root") == ["toy"]


@pytest.mark.parametrize("before", [{}, {"a.txt": b"my own"}, {"a.txt": b"first", "config.json": b"{}"}])
def test_files_of_the_user_in_the_folder_of_an_asset_stay(toy: Toy, tmp_path: Path, before: dict[str, bytes]) -> None:
    toy(wheel())
    folder, said = tmp_path / "root" / "toy", list[str]()
    (folder / "sub").mkdir(parents=True)
    own = before | {"notes.txt": b"mine", "sub/data.json": b"[]"}
    for name, data in own.items():
        (folder / name).write_bytes(data)
    assets.fetch(["toy"], download=giving(wheel()), say=said.append)
    found = contents(folder)
    assert set(own.values()) <= set(found.values()), "every file of the user is there"
    moved = {"a.txt": "a.txt.old"} if before.get("a.txt") == b"my own" else {}
    assert found == {moved.get(name, name): data for name, data in own.items()} | CONTENT
    assert [f"{folder / name} had other content, which is now in {kept}" for name, kept in moved.items()] == said[1:-1]


def test_what_an_earlier_fetch_kept_stays_too(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    for content in (b"one", b"two"):
        (tmp_path / "root" / "toy").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "toy" / "a.txt").write_bytes(content)
        assets.fetch(["toy"], download=giving(wheel()))
    kept = {"a.txt.old": b"one", "a.txt.old1": b"two"}
    assert contents(tmp_path / "root" / "toy") == CONTENT | kept


def test_the_same_command_repairs_what_a_kill_between_two_files_leaves(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy(wheel())
    folder = tmp_path / "root" / "toy"
    folder.mkdir(parents=True)
    (folder / "b.bin").write_bytes(b"mine")
    for allowed in (0, 1):  # files that are placed before the kill
        with monkeypatch.context() as patch:
            left = iter(range(allowed))

            def move(file: Path, place: Path, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                file.rename(place)

            patch.setattr(placing.shutil, "move", move)
            with pytest.raises(KeyboardInterrupt):
                assets.fetch(["toy"], download=giving(wheel()))
        assert assets.problem(ASSETS["toy"], tmp_path / "root")
    assets.fetch(["toy"], download=giving(wheel()))
    assert contents(tmp_path / "root") == {f"toy/{name}": data for name, data in CONTENT.items()} | {
        "toy/b.bin.old": b"mine"
    }


def test_a_file_in_the_place_of_the_folder_is_named_before_the_download(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "toy").write_text("mine")
    with pytest.raises(UserError, match=r"toy is a file: rename it, or set SPARSEGRAD_ASSETS"):
        assets.fetch(["toy"], download=offline)
    assert (tmp_path / "root" / "toy").read_text() == "mine"


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
