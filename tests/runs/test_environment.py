"""What a record says of the machine, the versions and the code of its run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from sparsegrad.runs import environment
from sparsegrad.runs.environment import describe_environment

CPU = torch.device("cpu")


def git(root: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, which the package seems to run from."""
    root = tmp_path / "checkout"
    for file in ("sparsegrad/api.py", "conf/config.yaml", "experiments/labels.py", "run.py", "results/a.json"):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    git(root.parent, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    monkeypatch.setattr(environment, "ROOT", root.resolve())
    return root


def test_the_environment_names_versions_commit_and_hardware() -> None:
    found = describe_environment(CPU)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["hardware"]["device"] == "cpu"
    assert found["hardware"]["memory_gib"] > 0
    assert found["hardware"]["bfloat16"] in (True, False)
    assert not found["git"] or len(found["git"]["commit"]) == 40
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("file", ["sparsegrad/api.py", "conf/config.yaml", "experiments/labels.py", "run.py"])
def test_changed_code_is_named(checkout: Path, file: str) -> None:
    assert describe_environment(CPU)["git"]["dirty"] is False
    (checkout / file).write_text("b")
    assert describe_environment(CPU)["git"]["dirty"] is True


def test_a_new_method_of_the_user_is_changed_code(checkout: Path) -> None:
    (checkout / "conf" / "mine.yaml").write_text("a")
    assert describe_environment(CPU)["git"]["dirty"] is True


def test_results_and_notes_are_not_code(checkout: Path) -> None:
    for file in ("results/b.json", "notes.txt"):
        (checkout / file).write_text("b")
    assert describe_environment(CPU)["git"]["dirty"] is False


def test_the_commit_of_a_repository_around_the_installation_is_not_taken(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", (checkout / "sparsegrad").resolve())
    assert describe_environment(CPU)["git"] == {}
