"""Shared by the tests of judge and client: questions, answers, prompts, and the judge command on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Judge, serve

from experiments.mtbench.cli import main
from experiments.mtbench.lines import read_lines
from experiments.mtbench.schema import Answer, JudgePrompt, answer_id

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Again."]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"], "reference": ["REF-TWO", "REF-FOUR"]},
    {"question_id": "x", "category": "own", "turns": ["One turn only?"]},
]
TURNS = 5
ONE, MATH = "answer: {answer}", "ref: {ref_answer_1} answer: {answer}"
TWO = "{question_1}|{answer_1}|{question_2}|{answer_2}"
PROMPTS = {
    "single-v1": JudgePrompt("single-v1", "sys", "{question} " + ONE),
    "single-math-v1": JudgePrompt("single-math-v1", "sys", "{question} " + MATH),
    "single-v1-multi-turn": JudgePrompt("single-v1-multi-turn", "sys", TWO),
    "single-math-v1-multi-turn": JudgePrompt(
        "single-math-v1-multi-turn", "sys", TWO + "|{ref_answer_1}|{ref_answer_2}"
    ),
}


@pytest.fixture
def own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the packaged prompts, which are an asset."""
    monkeypatch.setattr("experiments.mtbench.cli.load_prompts", lambda: PROMPTS)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serve() as served:
        yield served


def write_answers(folder: Path, name: str = "tiny", said: str = "said") -> Path:
    """Write an answers file with one answer per question."""
    rows = []
    for question in QUESTIONS:
        turns = tuple(f"{said} {question['question_id']}.{turn}" for turn in range(len(question["turns"])))
        made = answer_id(name, question["question_id"], turns)
        rows.append(Answer(question["question_id"], name, turns, made, 1.0).row())
    path = folder / "model_answer" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    write_answers(tmp_path)
    return tmp_path


def run(folder: Path, url: str, *more: str, name: str = "tiny") -> int:
    """Run the judge command with short pauses; returns its exit status."""
    fixed = ("judge", "--yes", "--model", "j", "--backoff", "0.01", "--questions", str(folder / "questions.jsonl"))
    answers = str(folder / "model_answer" / f"{name}.jsonl")
    return main([*fixed, "--answers", answers, "--base-url", url, *more])


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "model_judgment" / "j_single.jsonl")
