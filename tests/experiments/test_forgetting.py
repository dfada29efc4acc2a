"""`make forgetting`: runs without an adapter are trained again, results of different texts are never mixed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_fixtures import LLAMA, tiny_llama, tree, write_trees
from quick_python import quick_python
from run_fixtures import ROOT, environment, last_wins

from experiments.compare import forgetting
from experiments.compare.forgetting import PLAN
from experiments.report.comparison.forgotten import FOLDER, read_forgetting
from experiments.reproduce.cells import Cell, list_cells
from sparsegrad.errors import UserError
from sparsegrad.files import write_json


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"the film number {number} was good"}) + "\n" for number in range(4)))
    return path


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One run of a tiny model that is stored in a folder, as an adapter needs a base; processes start at once."""
    monkeypatch.setattr(sys, "executable", quick_python())
    monkeypatch.setattr(forgetting, "write_comparison", lambda results, folder: f"table of {folder}")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, value in environment(PYTHONPATH=path).items():
        monkeypatch.setenv(name, value)
    tiny_llama(vocab_size=30522, max_position_embeddings=64).save_pretrained(tmp_path / "base")
    small = [one for one in LLAMA if not one.startswith(("model.architecture", "model=", "task=", "model.usual"))]
    more = ["model.weights=pretrained", f"model.source={tmp_path / 'base'}", "hparams=null", "seed=42"]
    more += ["train.precision=fp32", "protocol.eval_steps=3", "protocol.epochs=1"]
    places = [f"results_dir={tmp_path / 'results'}", f"work_dir={tmp_path / 'work'}"]
    return last_wins(*small, *more, *places)


def write_record(cell: Cell, folder: str) -> Path:
    """A complete record without an adapter, as evidence_smollm2 leaves it."""
    path = Path(cell.config.results_dir) / "runs" / folder / f"{cell.config.key}.json"
    write_json(path, {"schema": 1, "status": "complete", "config": cell.config.resolved})
    return path


def test_a_shared_run_without_adapter_is_trained_again_and_its_record_stays(
    given: list[str], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = write_trees(tmp_path / "trees.jsonl", [tree(number) for number in range(30)])
    (cell,) = list_cells(PLAN, [*given, "method=lora"], str(trees))
    call = ["--texts", str(texts), "--methods", "lora", *given]
    assert forgetting.main(call) == 2
    command = "make compare SCALE=mini TREES=<file of conversation trees> METHODS=lora TASKS=oasst1 ARGS=results_dir="
    assert f"{command}{cell.config.results_dir} runs it" in capsys.readouterr().err
    record = write_record(cell, "evidence_smollm2")
    before = record.read_bytes()

    assert forgetting.main(call) == 1, "the run has no adapter, and no trees are given"
    assert "TREES=<file of conversation trees> trains it again" in capsys.readouterr().out
    call += ["--trees", str(trees)]
    assert forgetting.main([*call, "--dry"]) == 0
    assert "0 of 1 cells complete" in capsys.readouterr().out
    assert not (tmp_path / "work" / "forgetting").exists()

    assert forgetting.main(call) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert f"table of {PLAN}" in said
    result = read_forgetting(tmp_path / "results")[cell.config.key]
    assert result["trained_again"]
    assert abs(result["after"] - result["before"]) > 1e-4
    assert (result["rows"], result["tokens"]) == (4, 128)
    assert record.read_bytes() == before
    assert not (tmp_path / "results" / "adapters").exists()
    made = next((tmp_path / "work" / "forgetting" / "runs").rglob("*.json"))
    assert made.stem == cell.config.key

    stamp = made.stat().st_mtime_ns
    assert forgetting.main(call) == 0
    assert "1 of 1 complete runs are measured" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == stamp
    assert forgetting.main([*call, "--tokens", "8"]) == 2
    assert "--tokens 128" in (error := capsys.readouterr().err)
    assert "delete the folder" in error


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"text": "a b"}', ["--rows", "0"], "--rows=0 is not allowed"),
        ('{"text": "a b"}', ["--rows", "-1"], "--rows=-1 is not allowed"),
        ('{"text": "a b"}', ["--tokens", "1"], "--tokens=1 is not allowed"),
        ('{"text": "a b"}', ["--workers", "0"], "WORKERS=0 is not allowed"),
        ('{"text": "a b"}', ["--methods", "magic"], "METHODS=magic is not allowed"),
        ('["a b"]', [], "entry 1 is 'a b', not an object"),
        ('{"text": "a b"}\n7', [], "entry 2 is '7', not an object"),
        ('{"instruction": "a b"}', [], "has no texts"),
        ('{"text": ["a"], "output": ""}', [], "has no texts"),
        ("{", [], "cannot be read"),
        (None, [], "TEXTS is missing"),
    ],
)
def test_bad_input_is_one_line(
    content: str | None, options: list[str], message: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts.write_text(content or "")
    assert forgetting.main([*(["--texts", str(texts)] if content else []), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"before": 2.0, "after": 2.5, "texts": "b", "rows": 4, "tokens": 8}, "TEXTS of hash b.*delete"),
        ({"before": 2.0, "after": 2.5, "texts": "a", "rows": 4, "tokens": 16}, "--tokens 16.*delete"),
        ({"before": 2.0}, "is not a result.*delete"),
        ({"before": 2.0, "after": None}, "is not a result.*delete"),
    ],
)
def test_results_of_different_texts_and_damaged_ones_are_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    result = {"before": 2.0, "after": 2.5, "texts": "a", "rows": 4, "tokens": 8}
    write_json(tmp_path / FOLDER / "a.json", result)
    assert read_forgetting(tmp_path) == {"a": result}
    write_json(tmp_path / FOLDER / "b.json", other)
    with pytest.raises(UserError, match=f"(?s){message}"):
        read_forgetting(tmp_path)
