"""The two files of a LoRA adapter: wherever a save ends, they are those of one adapter, the old one or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsegrad import UserError
from sparsegrad.adapter.folder_lock import remove_files
from sparsegrad.adapter.lora_files import CONFIG, LORA, TENSORS, check_lora, settle_lora, write_lora

STEPS = range(8)  # before and after each of four renames: of the waiting configuration, the old one, both new files


def save(folder: Path, value: float, config: float | None = None) -> None:
    settings = {"r": value if config is None else config}
    write_lora(folder, settings, {"lora_A": torch.full((4,), value)})


def found(folder: Path) -> tuple[float, float]:
    """What the configuration and the tensors say."""
    return json.loads((folder / CONFIG).read_text())["r"], float(load_file(folder / TENSORS)["lora_A"][0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".sparsegrad_adapter.lock")


def stopping_at(step: int, stop: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    """A `Path.replace` that calls `stop` once, before or after a rename."""
    replace, moments = Path.replace, iter(STEPS)

    def renamed(path: Path, target: Path) -> Path:
        if next(moments, None) == step:
            stop()
        result = replace(path, target)
        if next(moments, None) == step:
            stop()
        return result

    return renamed


def killed(step: int, folder: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save in a process that ends at `step`, without any handler of ours."""
    if (child := os.fork()) == 0:
        monkeypatch.setattr(Path, "replace", stopping_at(step, lambda: os._exit(9)))
        save(folder, value)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_save_is_completed_or_undone(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0)
    killed(step, tmp_path, 2.0, monkeypatch)
    if (tmp_path / CONFIG).exists():
        assert found(tmp_path) in ((1.0, 1.0), (2.0, 2.0))
    settle_lora(tmp_path)
    assert found(tmp_path) == ((1.0, 1.0) if step < 5 else (2.0, 2.0))
    killed(step, tmp_path, 3.0, monkeypatch)  # and once more
    with pytest.raises(TypeError):  # the next save completes or undoes it too, before it writes anything
        write_lora(tmp_path, {"r": object()}, {"lora_A": torch.zeros(4)})
    assert found(tmp_path)[0] == found(tmp_path)[1]
    save(tmp_path, 4.0)
    assert found(tmp_path) == (4.0, 4.0)
    assert names(tmp_path) == [CONFIG, TENSORS]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_after_an_error_the_folder_holds_one_adapter(
    step: int, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)

    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_at(step, fail))
        with pytest.raises((KeyboardInterrupt, UserError)):
            save(tmp_path, 2.0)
    assert found(tmp_path) == ((1.0, 1.0) if step < 5 else (2.0, 2.0))
    assert names(tmp_path) == [CONFIG, TENSORS]


def test_the_first_save_of_a_folder_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no old configuration to put aside: three renames."""
    killed(3, tmp_path, 1.0, monkeypatch)
    assert not (tmp_path / CONFIG).exists()
    settle_lora(tmp_path)
    assert found(tmp_path) == (1.0, 1.0)


def test_new_tensors_of_one_configuration_replace_the_old_ones(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save(tmp_path, value, config=8)
        assert found(tmp_path) == (8, value)


def test_what_killed_saves_of_earlier_versions_left_is_deleted(tmp_path: Path) -> None:
    for name in (f".{TENSORS}.99.new", f".{CONFIG}.99.new", f"..{CONFIG}.99.new.99.tmp", "notes.txt"):
        (tmp_path / name).touch()
    save(tmp_path, 1.0)
    assert names(tmp_path) == [CONFIG, TENSORS, "notes.txt"]
    remove_files(tmp_path, LORA)
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-3]), "damaged LoRA adapter"),
        (lambda f: (f / CONFIG).write_text("{"), "damaged LoRA adapter"),
        (lambda f: (f / CONFIG).write_text("[]"), "damaged LoRA adapter"),
        (lambda f: (f / TENSORS).unlink(), f"has no {TENSORS}: save"),
        (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}: save"),
    ],
)
def test_damage_is_found(spoil: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, 1.0)
    check_lora(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        check_lora(tmp_path)
