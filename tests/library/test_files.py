"""A path that cannot be written is reported with the remedy for its cause."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_checks import Prepared, own_model

from sparsegrad import UserError, save_adapter
from sparsegrad.adapter.lora_files import write_lora
from sparsegrad.basis import Basis, save_bases
from sparsegrad.files import check_writable, read_json, unwritable, write_json


def save(folder: Path) -> None:
    model = own_model()
    model[0].weight.data += 1
    save_adapter(model, folder, own_model(), Prepared(model[0].weight))


@pytest.mark.parametrize(
    "write",
    [
        save,
        lambda taken: save(taken / "below"),
        check_writable,
        lambda taken: check_writable(taken / "runs" / "adhoc"),
        lambda taken: write_json(taken / "record.json", {}),
        lambda taken: save_bases(taken / "bases.safetensors", {"up": Basis.identity(4, 4)}),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(write: Callable[[Path], None], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(UserError, match=rf"cannot write .*; {taken} is a file: choose another folder$"):
        write(taken)
    assert taken.read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(UserError, match=r"record\.json is a folder: choose another name"):
        write_json(tmp_path / "record.json", {})


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "permissions"), (errno.EROFS, "permissions"), (errno.ENOSPC, "free space there")],
)
def test_the_remedy_fits_the_error(number: int, remedy: str, tmp_path: Path) -> None:
    said = str(unwritable(tmp_path, OSError(number, os.strerror(number))))
    assert said.startswith(f"cannot write {tmp_path}: {os.strerror(number)}; ")
    assert remedy in said


def test_a_file_system_without_permissions_keeps_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_lora(tmp_path / "lora", {}, {"a": torch.zeros(2)})
    assert list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    """safetensors itself writes files that only their owner can read, which a shared folder hides from everybody."""
    before = os.umask(umask)
    try:
        save(tmp_path / "adapter")
        save_bases(tmp_path / "bases.safetensors", {"kind": Basis(torch.eye(3), torch.eye(2))})
        write_lora(tmp_path / "lora", {}, {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    # Another user who may write to the folder must be able to open its lock, which is empty.
    locks = {path for path in files if path.suffix == ".lock"}
    assert {path.stat().st_size for path in locks} == {0}
    written = files - locks
    assert len(written) >= 5
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        ('{"a":' * 100_000, "recursion"),
        ('{"a": ' + "9" * 310 + "}", "a number of 310 digits"),
        ('{"a": ', "Expecting value"),
    ],
)
def test_json_that_code_would_stumble_over_later_is_not_read(tmp_path: Path, text: str, said: str) -> None:
    """Python reads the first and the third; copies of the one are too deep, and floats cannot hold the other."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_json(path)


def test_json_up_to_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 32 + "9" * 300 + "]" * 32)
    found = read_json(path)
    for _ in range(32):
        (found,) = found
    assert float(found) == pytest.approx(1e300)
