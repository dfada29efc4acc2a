"""Instruction rows: which conversations come out, how they are split, what is refused; a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_fixtures import LLAMA
from run_fixtures import Composer, last_wins

from sparsegrad.assets.download import assets_root, problem
from sparsegrad.assets.table import ASSETS
from sparsegrad.errors import UserError
from sparsegrad.runs.config import build
from sparsegrad.runs.runner import run
from sparsegrad.tasks import DataConfig, Instructions


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"add {number} and two", "input": "", "output": f"it is {number + 2}", **fields}


def write(path: Path, rows: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) if lines else json.dumps(rows))
    return path


def load(path: Path) -> Any:
    return Instructions(name="alpaca", eval_base=4).load(DataConfig(dir=str(path)))


def turns(rows: Any) -> list[tuple[str, str]]:
    return [tuple(turn["text"] for turn in json.loads(text)) for text in rows["conversation"]]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_row_is_a_question_and_an_answer(tmp_path: Path, name: str) -> None:
    found = load(write(tmp_path / name, [row(i) for i in range(60)]))
    both = turns(found.train) + turns(found.validation)
    assert sorted(both) == sorted((f"add {i} and two", f"it is {i + 2}") for i in range(60))
    assert found.counts == {"train_conversations": len(found.train), "validation_conversations": len(found.validation)}
    assert json.loads(found.train["conversation"][0])[0]["role"] == "user"


def test_the_input_stands_below_the_instruction_and_may_be_missing(tmp_path: Path) -> None:
    rows = [row(i, input="in roman digits") for i in range(40)] + [{"instruction": "wait", "output": "I do"}]
    found = load(write(tmp_path / "rows.json", rows))
    questions = [question for question, _ in turns(found.train) + turns(found.validation)]
    assert "add 7 and two\n\nin roman digits" in questions
    assert "wait" in questions


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    rows = [row(i, output="one\u2028two") for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in rows))
    found = load(path)
    assert {answer for _, answer in turns(found.train)} == {"one\u2028two"}


def test_one_prompt_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = [row(i, output=f"answer {j}") for i in range(60) for j in range(3)]
    found = load(write(tmp_path / "rows.json", rows))
    assert not set(found.train["group"]) & set(found.validation["group"])
    assert len(found.train) + len(found.validation) == 180


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(1, output=" "), "row 2 has no output"),
        (row(1, instruction=None), "row 2 has no instruction"),
        (row(1, input=5), "row 2 has no input"),
        ("text", "row 2: give one JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(write(tmp_path / "rows.json", [row(0), bad]))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.json", "{", "is not valid JSON"),
        ("rows.json", '{"a": 1}', "is no list"),
        ("rows.jsonl", "\n{", "line 2 is not valid JSON"),
        ("rows.json", "[]", r"is left for the train split of data\.dir=.*rows\.json"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        load(tmp_path / name)


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path)


def test_the_command_line_trains_on_it(conf: Composer, tmp_path: Path, places: tuple[str, str]) -> None:
    path = write(tmp_path / "rows.json", [row(i) for i in range(80)])
    given = ("task=alpaca", f"data.dir={path}", "method=lora", "protocol.max_steps=8", *places)
    record, _ = run(build(conf(*last_wins(*LLAMA, *given))))
    assert record["result"]["value"] < record["evaluations"][0]["nll"]
    assert record["data"]["counts"]["train_conversations"] > 60


@pytest.mark.skipif(bool(problem(ASSETS["alpaca"], assets_root())), reason="needs `python -m sparsegrad.assets alpaca`")
def test_the_assets_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEGRAD_ASSETS", str(assets_root().resolve()))
    counts = Instructions(name="alpaca", eval_base=4).load(DataConfig()).counts
    assert counts == {"train_conversations": 909, "validation_conversations": 90}
