"""A folder holds the adapter of before or the new one, wherever a save ends, and what its user wrote stays."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import Prepared, own_model
from filelock import FileLock
from model_states import bits, has_bits
from torch import nn

from sparsegrad import UserError, load_adapter, save_adapter
from sparsegrad.adapter import folder_lock
from sparsegrad.adapter import format as adapter_file
from sparsegrad.adapter.format import FACTS, TENSORS, Entry, read_adapter, write_adapter
from sparsegrad.errors import ResourceError


def trained(by: float) -> Any:
    model = own_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by
    return model


def save(folder: Path, by: float) -> None:
    model = trained(by)
    save_adapter(model, folder, own_model(), Prepared(model[0].weight))


def loaded(folder: Path) -> nn.Module:
    model = own_model()
    load_adapter(model, folder).merge()
    return model


def names(folder: Path) -> list[str]:
    """Without the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".sparsegrad_adapter.lock")


def failing(number: int) -> Any:
    """A function that fails as reading from a disk does."""

    def fail(path: Path) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return fail


class Killed(BaseException):
    """No handler of ours may see it."""


def killed_at(step: str, patch: pytest.MonkeyPatch) -> None:
    """End the process, as it were: before the tensors are named, before or after the JSON is there."""
    replace, unlink = Path.replace, Path.unlink
    steps = {TENSORS: "unnamed", FACTS: "named"}

    def stop(path: Path, target: Path) -> Path:
        if Path(target).name == TENSORS or steps.get(path.name) == step:
            patch.setattr(Path, "unlink", lambda path, **_: path.suffix == ".tmp" and unlink(path))
            patch.setattr(folder_lock, "_delete", lambda *_: None)
            raise Killed
        return replace(path, target)

    patch.setattr(Path, "replace", stop)


@pytest.mark.parametrize(("step", "found"), [("unnamed", 1.0), ("named", 1.0), ("told", 2.0)])
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(
    step: str, found: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        killed_at(step, patch)
        with pytest.raises(Killed):
            save(tmp_path, 2.0)
    assert has_bits(loaded(tmp_path), bits(trained(found)))
    with monkeypatch.context() as patch:  # and killed once more
        killed_at("named", patch)
        with pytest.raises(Killed):
            save(tmp_path, 3.0)
    assert has_bits(loaded(tmp_path), bits(trained(found)))
    save(tmp_path, 4.0)
    assert has_bits(loaded(tmp_path), bits(trained(4.0)))
    assert names(tmp_path) == ["README.md", FACTS, TENSORS]


def test_what_killed_saves_left_is_deleted(tmp_path: Path) -> None:
    for name in (f".{TENSORS}.99.tmp", f".{FACTS}.99.tmp", f"sparsegrad_adapter.{64 * 'a'}.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".sparsegrad_adapter.99.saving").mkdir()
    (tmp_path / ".sparsegrad_adapter.99.saving" / ".tmpAbCdEf").touch()  # safetensors' own
    (tmp_path / ".sparsegrad_adapter.lock").touch()
    save(tmp_path, 1.0)
    assert names(tmp_path) == ["README.md", "notes.txt", FACTS, TENSORS]


def test_two_processes_that_save_to_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins while the first has written its tensors and not yet its JSON."""
    write_json, children = adapter_file.write_json, []

    def fork(path: Path, facts: Any) -> None:
        monkeypatch.setattr(adapter_file, "write_json", write_json)
        if (child := os.fork()) == 0:
            other = {"x": Entry("whole", (3,), torch.float32, None, torch.full((3,), 2.0))}
            write_adapter(tmp_path, {}, other, {})
            os._exit(0)
        children.append(child)
        time.sleep(0.2)
        write_json(path, facts)

    monkeypatch.setattr(adapter_file, "write_json", fork)
    write_adapter(tmp_path, {}, {"x": Entry("whole", (3,), torch.float32, None, torch.ones(3))}, {})
    assert [os.waitpid(child, 0)[1] for child in children] == [0]
    _, entries, _ = read_adapter(tmp_path)
    assert entries["x"].values.tolist() == [2.0, 2.0, 2.0]
    assert names(tmp_path) == [FACTS, TENSORS]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EACCES, errno.EROFS])
def test_without_locks_nothing_of_others_is_deleted(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileLock, "_acquire", lambda *_: failing(number)(tmp_path))
    (tmp_path / f".{TENSORS}.99.tmp").touch()
    save(tmp_path, 1.0)
    assert names(tmp_path) == [f".{TENSORS}.99.tmp", "README.md", FACTS, TENSORS]


def test_a_json_that_cannot_be_read_for_a_moment_leaves_an_interrupted_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        killed_at("told", patch)
        with pytest.raises(Killed):
            save(tmp_path, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(adapter_file, "load_json", failing(errno.ESTALE))
        with pytest.raises(ResourceError, match=r"cannot read .*json \(Stale file handle\): nothing was deleted"):
            save(tmp_path, 3.0)
    assert has_bits(loaded(tmp_path), bits(trained(2.0)))


@pytest.mark.parametrize("file", [FACTS, TENSORS])
def test_a_file_that_cannot_be_read_is_not_called_damaged(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    monkeypatch.setattr(adapter_file, "load_json" if file == FACTS else "file_sha256", failing(errno.EIO))
    with pytest.raises(ResourceError, match=rf"cannot read .*{file} \(Input/output error\): nothing was deleted"):
        loaded(tmp_path)


def test_tensors_that_cannot_be_opened_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0)
    plain_open = Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        return failing(errno.EACCES)(path) if path.name == TENSORS else plain_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ResourceError, match=rf"cannot read .*{TENSORS} \(Permission denied\)"):
        loaded(tmp_path)


def test_a_json_that_cannot_be_written_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0)

    def full(path: Path, facts: Any) -> None:
        raise UserError(f"cannot write {path}: no space")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_file, "write_json", full)
        with pytest.raises(UserError, match="no space"):
            save(tmp_path, 2.0)
    assert has_bits(loaded(tmp_path), bits(trained(1.0)))
    assert names(tmp_path) == ["README.md", FACTS, TENSORS]


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("adapter_config.json", r"this is a peft adapter: load it with peft\.PeftModel\.from_pretrained"),
        ("config.json", "this is a whole model: load it with from_pretrained"),
        (None, "there is no such folder"),
        ("notes.txt", rf"{FACTS} is missing; name a folder of save_adapter"),
    ],
)
def test_what_is_no_adapter_is_named(file: str | None, remedy: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    if file is not None:
        folder.mkdir()
        (folder / file).write_text("{}")
    with pytest.raises(UserError, match=rf"^no adapter in .*: .*{remedy}"):
        load_adapter(own_model(), folder)


def test_a_file_is_no_folder_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match=r"^no adapter in .*: it is a file; name the folder"):
        load_adapter(own_model(), tmp_path / "file")


def test_no_value_in_the_json_names_a_file_outside(tmp_path: Path) -> None:
    """The tensors are read from the folder alone, and a file of somebody else that lies there is not removed."""
    save(tmp_path / "one", 1.0)
    (tmp_path / "one" / TENSORS).rename(tmp_path / "one" / "sparsegrad_adapter.mine.safetensors")
    facts = json.loads((tmp_path / "one" / FACTS).read_text())
    for sha256 in ("mine", "/../../one/sparsegrad_adapter.mine", ["mine"], None):
        (tmp_path / "one" / FACTS).write_text(json.dumps({**facts, "sha256": sha256}))
        with pytest.raises(UserError, match=f"no adapter in .*{TENSORS} is missing"):
            load_adapter(own_model(), tmp_path / "one")
    (tmp_path / "one" / FACTS).write_text(json.dumps(facts))
    save(tmp_path / "one", 2.0)
    assert (tmp_path / "one" / "sparsegrad_adapter.mine.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_buffers_of_every_whole_dtype_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = own_model(), trained(1.0)
    base.register_buffer("seen", torch.zeros(5, dtype=dtype))
    model.register_buffer("seen", torch.ones(5, dtype=dtype))
    save_adapter(model, tmp_path, base, Prepared(model[0].weight))
    load_adapter(base, tmp_path).merge()
    assert has_bits(base, bits(model))
    assert base.seen.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn])
def test_a_dtype_that_could_not_be_loaded_is_refused_unless_it_stayed(dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = own_model(), trained(1.0)
    for each in (base, model):
        each.register_buffer("seen", torch.zeros(5).to(dtype))
    save_adapter(model, tmp_path / "same", base, Prepared(model[0].weight))
    model.seen = torch.ones(5).to(dtype)
    with pytest.raises(UserError, match=rf"seen is {dtype}, .* torch\.bfloat16.*persistent=False"):
        save_adapter(model, tmp_path / "other", base, Prepared(model[0].weight))
    assert not (tmp_path / "other").exists()
