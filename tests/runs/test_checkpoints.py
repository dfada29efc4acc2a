"""Checkpoints count when whole, are few, and real processes that are killed end as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from quick_python import quick_python
from run_fixtures import ROOT, Tiny, environment
from test_runs import Stop
from transformers import TrainerCallback

from sparsegrad.errors import UserError
from sparsegrad.runs.runner import run
from sparsegrad.trainer.checkpoints import KEEP, MANIFEST, is_whole, last_checkpoint, seal

pytestmark = pytest.mark.xdist_group("checkpoints")  # its fixtures take long: one worker makes them


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run stopped after step 3 left: checkpoints of steps 1, 2 and 3, at most."""
    from hydra import compose, initialize_config_dir
    from run_fixtures import SHORT, TINY, last_wins, write_rows

    from sparsegrad.runs.config import build

    place = tmp_path_factory.mktemp("run")
    more = (f"data.dir={write_rows(place / 'data')}", f"results_dir={place / 'r'}", f"work_dir={place / 'w'}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", last_wins(*TINY, *SHORT, *more, "method=full", "protocol.eval_steps=1"))
    config = build(composed)
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(4)])
    return config.checkpoints


def spoilt(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"cut": content[:middle], "emptied": b"", "flipped": flipped, "longer": content + b"\0"}


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth", "scheduler.pt", MANIFEST])
def test_a_damaged_file_is_detected_and_the_checkpoint_before_is_used(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    newest, before = (checkpoints / f"checkpoint-{step}" for step in (3, 2))
    assert is_whole(newest)
    content = (newest / name).read_bytes()
    for how, damaged in spoilt(content).items():
        if (name, how) == (MANIFEST, "flipped"):
            damaged = content.replace(b'"optimizer.pt"', b'"optimizeR.pt"')
        (newest / name).write_bytes(damaged)
        assert not is_whole(newest), how
    folder = tmp_path / "checkpoints"  # `last_checkpoint` removes what is damaged
    shutil.copytree(checkpoints, folder)
    (newest / name).write_bytes(content)
    assert last_checkpoint(folder) == str(folder / before.name)
    assert not (folder / newest.name).exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", MANIFEST])
def test_a_file_that_cannot_be_read_for_a_moment_deletes_nothing(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """Neither the checkpoint it is of, nor a newer one that is damaged indeed."""
    folder, opened = tmp_path / "checkpoints", Path.open
    shutil.copytree(checkpoints, folder)
    (folder / "checkpoint-3" / "optimizer.pt").unlink()

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == folder / "checkpoint-2" / name:
            raise OSError(code, "no answer")  # without the file's name, as a read gives it
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(UserError, match=rf"checkpoint-2/{name} \(no answer\): nothing was deleted; try again"):
        last_checkpoint(folder)
    assert (folder / "checkpoint-2" / name).exists()
    assert (folder / "checkpoint-3").is_dir()
    monkeypatch.undo()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_the_faq_names_every_file_of_a_checkpoint_that_torch_has_pickled(checkpoints: Path) -> None:
    names = {path.name for path in (checkpoints / "checkpoint-3").iterdir() if zipfile.is_zipfile(path)}
    answer = (ROOT / "docs" / "faq.md").read_text().split("**Does it use pickle?**")[1]
    assert "optimizer.pt" in names
    assert [name for name in names if f"`{name}`" not in answer] == []


def test_a_changed_digit_in_the_manifest_is_found_and_one_of_an_earlier_version_is_read(
    checkpoints: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    manifest = checkpoint / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "unlogged": {"loss": 1.0, "since": 0}}))
    assert not is_whole(checkpoint)
    manifest.write_text(json.dumps({"files": content["files"], "unlogged": content["unlogged"]}))
    assert is_whole(checkpoint)


def scripted(scores: list[float]) -> Any:
    """A `compute_metrics` whose evaluations have these scores, one after the other."""
    left = iter(scores)
    return lambda task: lambda prediction: {"accuracy": next(left)}


@pytest.mark.parametrize(("damaged", "began", "lost"), [((6,), 4, 1), ((6, 2), 0, 3)])
def test_a_checkpoint_that_was_the_first_to_be_best_again_can_be_lost(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damaged: tuple[int, ...],
    began: int,
    lost: int,
) -> None:
    """The one before names an older one as its best, which must still be there; without it, the run starts over."""
    config = tiny("method=full", "protocol.max_steps=8")
    monkeypatch.setattr("sparsegrad.runs.trainer_setup.compute_metrics", scripted([0.5, 0.4, 0.6]))
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(7)])
    for step in damaged:
        (config.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    monkeypatch.setattr("sparsegrad.runs.trainer_setup.compute_metrics", scripted([0.5] * 4))
    again = Stop()
    run(config, callbacks=[again])
    assert again.began == began
    assert (
        len(re.findall(rf"incomplete: {'using .*checkpoint-4' if began else 'the run starts over'}", caplog.text))
        == lost
    )


def test_a_checkpoint_is_on_the_disk_before_its_manifest(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power failure could leave an empty file beside a manifest that is right."""
    checkpoint, flushed, fsync = tmp_path / "checkpoint-2", [], os.fsync
    shutil.copytree(checkpoints / checkpoint.name, checkpoint)

    def note(number: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    seal(checkpoint, {})
    names = [path.name.strip(".").split(".json.")[0].replace("manifest", MANIFEST) for path in flushed]
    files = sorted(path.name for path in checkpoint.iterdir() if path.name != MANIFEST)
    assert names == [*files, checkpoint.name, MANIFEST, checkpoint.name, tmp_path.name]


def test_a_tokenizers_folder_of_chat_templates_does_not_hinder_a_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints / checkpoint.name, checkpoint)
    (checkpoint / "additional_chat_templates").mkdir()
    seal(checkpoint, {})
    assert "additional_chat_templates" not in json.loads((checkpoint / MANIFEST).read_text())["files"]


class Count(TrainerCallback):  # type: ignore[misc]
    """Bytes and checkpoints that lie there when one has just been written, before older ones go, and at each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.after_saving, self.at_steps = folder, [0], [0]

    def _found(self) -> int:
        return len(list(self.folder.glob("checkpoint-*")))

    def on_save(self, *_: Any, **__: Any) -> None:
        self.after_saving.append(self._found())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at_steps.append(self._found())


def test_old_checkpoints_go_and_disk_use_is_bounded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegrad.trainer import trainer

    most = [0]
    prune = trainer.prune

    def counted(folder: Path, best: int | None) -> None:
        most.append(len(list(folder.glob("checkpoint-*"))))
        prune(folder, best)

    monkeypatch.setattr(trainer, "prune", counted)
    # A score that is best at the start and never again, so that the best checkpoint is an old one.
    config = tiny("method=full", "protocol.eval_steps=1", "protocol.max_steps=8", "train.lr=1e-9")
    count = Count(config.checkpoints)
    run(config, callbacks=[count])
    assert max(count.at_steps) == max(count.after_saving) == KEEP + 1
    assert max(most) == KEEP + 2
    assert not config.checkpoints.exists()


@pytest.mark.parametrize("methods", [["sparsegrad", "lora", "sparsegrad_authors"]])
def test_killed_processes_end_with_the_record_of_one_never_killed(tmp_path: Path, methods: list[str]) -> None:
    """One kill each, by SIGKILL, SIGTERM and SIGINT; `experiments.reliability.kill` does 20 for every method."""
    out = tmp_path / "kills.json"
    command = [quick_python(), "-m", "experiments.reliability.kill", "--methods", *methods]
    command += ["--kills", "1", "--steps", "63"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["method"]: row for row in json.loads(out.read_text())["methods"]}
    assert [rows[name]["log"][0]["how"] for name in methods] == ["SIGKILL", "SIGTERM", "SIGINT"]
    assert all(row["equal"] and row["kills"] == 1 for row in rows.values())
