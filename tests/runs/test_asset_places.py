"""The folder of an asset: files of the user's own in it, links to other disks, and two fetches at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from asset_cases import CONTENT, Toy, contents, giving, offline, wheel
from asset_cases import toy as toy  # the fixture
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sparsegrad.assets import disk, placing
from sparsegrad.assets import download as assets
from sparsegrad.assets.table import ASSETS, Asset
from sparsegrad.errors import ResourceError, UserError

OWN_NOTES = ["mine", "[1]", "{}", '{"name": "mine"}', '{"a.txt": null}']


def make_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "toy"
    folder.mkdir(parents=True)
    return folder


def test_a_note_of_conversions_is_no_name_of_other_assets(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    own = make_folder(tmp_path) / assets.CONVERTED
    own.write_text(json.dumps({"model.safetensors": "0" * 64}))
    assets.fetch(["toy"], download=giving(wheel()))
    assert own.is_file()


@pytest.mark.parametrize("own", OWN_NOTES)
def test_a_note_of_the_user_is_kept_like_any_file_in_the_way(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    asset = toy(wheel())
    monkeypatch.setitem(ASSETS, "toy", replace(asset, converts="a.txt"))
    monkeypatch.setattr(assets, "check_gguf", lambda: None)
    monkeypatch.setattr(assets, "convert", lambda folder, name: (folder / "made").write_bytes(b"made"))
    folder = make_folder(tmp_path)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    (folder / assets.CONVERTED).write_text(own)
    assert "converted.json is missing or damaged" in str(assets.problem(ASSETS["toy"], tmp_path / "root"))
    assets.fetch(["toy"], download=giving(wheel()))
    assert (folder / f"{assets.CONVERTED}.old").read_text() == own
    assert assets.asset_path("toy") == folder


def test_a_copy_that_is_killed_is_not_taken_for_a_file_of_the_user(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder is a link to another disk, a move is a copy."""
    package = wheel()
    toy(package)
    folder = make_folder(tmp_path)

    def cut(file: Path, place: Path) -> None:
        place.write_bytes(file.read_bytes()[:2])
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(placing.shutil, "move", cut)
            patch.setattr(placing.Path, "unlink", lambda *_, **__: None)  # as after a kill, nothing is cleaned up
            with pytest.raises(KeyboardInterrupt):
                assets.fetch(["toy"], download=giving(package))
    assert not set(contents(folder)) & {*CONTENT, "b.bin.old"}
    assets.fetch(["toy"], download=giving(package))
    assert contents(folder) == CONTENT


def test_a_link_to_nothing_is_named_before_the_download(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "toy").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"toy is a link to .*unmounted, which is not there: create that folder"):
        assets.fetch(["toy"], download=offline)


def test_the_disk_to_which_the_folder_is_linked_is_checked_too(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = replace(toy(wheel()), disk=1_300_000_000, stored=400_000_000)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "toy").symlink_to(other)
    usage = shutil.disk_usage(tmp_path)
    small = {other: usage._replace(free=300_000_000)}
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: small.get(path, usage._replace(free=2_000_000_000)))
    disk.check_disk(asset, tmp_path / "root", lambda line: None)  # on the same disk, all of it counts at once
    monkeypatch.setattr(disk, "_is_other_disk", lambda *_: True)
    with pytest.raises(UserError, match=r"needs 0\.4 GB in .*other, but only 0\.3 GB are free"):
        disk.check_disk(asset, tmp_path / "root", lambda line: None)


def test_one_process_at_a_time_places_files(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(wheel())
    locked = FileLock(tmp_path / "root" / ".toy.lock", timeout=0)
    place, seen = assets.place_files, list[Path]()

    def watched(new: Path, folder: Path, *rest: object) -> None:
        with pytest.raises(Timeout), locked:
            pass
        seen.append(folder)
        place(new, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(assets, "place_files", watched)
    assets.fetch(["toy"], download=giving(wheel()))
    with locked:
        assert seen == [tmp_path / "root" / "toy"]


def test_a_disk_that_safetensors_finds_full_is_named(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())

    def full(asset: Asset, folder: Path) -> Path:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ResourceError, match=r"cannot write .*root: .*free space there or choose .*SPARSEGRAD_ASSETS"):
        assets.fetch(["toy"], download=full)
