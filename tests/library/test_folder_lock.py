"""Saves to one folder take turns, whoever began them: other processes, other users, and a signal handler."""

from __future__ import annotations

import os
import signal
import stat
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from test_lora_files import CONFIG, found, names, stopping_at
from test_lora_files import save as save_lora

from sparsegrad.adapter import format as adapter_file
from sparsegrad.adapter.folder_lock import saving
from sparsegrad.adapter.format import ADAPTER, FACTS, TENSORS, Entry, read_adapter, write_adapter
from sparsegrad.adapter.lora_files import LORA
from sparsegrad.adapter.lora_files import TENSORS as LORA_TENSORS
from sparsegrad.errors import ResourceError


def save(folder: Path, value: float) -> None:
    write_adapter(folder, {}, {"x": Entry("whole", (4,), torch.float32, None, torch.full((4,), value))}, {})


def loaded(folder: Path) -> float:
    return float(read_adapter(folder)[1]["x"].values[0])


# How each format is saved, what is read of it again (of a LoRA adapter: of both files), and its files.
FORMATS = {
    "adapter": (save, lambda folder: (loaded(folder),), [FACTS, TENSORS]),
    "lora": (save_lora, found, [CONFIG, LORA_TENSORS]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [2.0, 3.0])  # that of the outer save, as of one state of the model, or another
@pytest.mark.parametrize("step", range(8))
def test_a_signal_handler_saves_a_whole_adapter_within_a_save(
    step: int, value: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read, files = FORMATS[name]
    interrupted = pytest.raises(ResourceError, match="a signal handler, came in between; the folder holds that adapter")
    write(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_at(step, lambda: write(tmp_path, value)))
        with nullcontext() if step == 7 else interrupted:
            write(tmp_path, 2.0)
    assert set(read(tmp_path)) == {value}
    assert names(tmp_path) == files
    write(tmp_path, 4.0)
    assert set(read(tmp_path)) == {4.0}


def test_a_signal_handler_that_ends_the_process_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a preemption: the system sends SIGTERM while the main code saves."""
    write_json = adapter_file.write_json

    def end(*_: Any) -> None:
        monkeypatch.setattr(adapter_file, "write_json", write_json)
        save(tmp_path, 3.0)
        raise SystemExit(0)

    def terminated(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.signal(signal.SIGTERM, end)
    try:
        monkeypatch.setattr(adapter_file, "write_json", terminated)
        with pytest.raises(SystemExit):
            save(tmp_path, 2.0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert loaded(tmp_path) == 3.0
    assert names(tmp_path) == [FACTS, TENSORS]
    with FileLock(tmp_path / ".sparsegrad_adapter.lock", timeout=0):
        pass


def test_a_save_that_waits_says_so_and_lets_a_signal_handler_wait_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        with saving(tmp_path, ADAPTER):
            os.write(told, b"x")
            time.sleep(0.5)
        os._exit(0)
    os.read(ready, 1)
    before = signal.signal(signal.SIGALRM, lambda *_: save(tmp_path, 3.0))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        save(tmp_path, 2.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert os.waitpid(child, 0)[1] == 0
    assert loaded(tmp_path) == 2.0
    assert caplog.text.count("waits for another process that saves to this folder") == 2
    with FileLock(tmp_path / ".sparsegrad_adapter.lock", timeout=0):
        pass


@pytest.mark.parametrize("files", [ADAPTER, LORA])
def test_whoever_may_write_to_the_folder_can_settle_a_killed_save(files: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    before = os.umask(0o022)
    try:
        with saving(tmp_path, files) as scratch:
            assert stat.S_IMODE(scratch.stat().st_mode) == 0o775
            # Here, since some versions of filelock delete the file at the end.
            assert stat.S_IMODE((tmp_path / ".sparsegrad_adapter.lock").stat().st_mode) == 0o666
    finally:
        os.umask(before)


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("has_locks", [True, False])
def test_an_interrupted_save_deletes_its_own_files(
    step: int, has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    def interrupt() -> None:
        raise KeyboardInterrupt

    if not has_locks:
        monkeypatch.setattr(FileLock, "_acquire", no_locks)
    save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_at(step, interrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2.0)
    assert loaded(tmp_path) == (1.0 if step < 5 else 2.0)
    assert names(tmp_path) == [FACTS, TENSORS]
