"""Questions, answers and judge prompts: FastChat's file formats, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.mtbench.lines import Row, read_lines
from sparsegrad.assets.download import asset_path
from sparsegrad.errors import UserError, check_text
from sparsegrad.hashing import json_sha256

QuestionId = int | str
# MT-Bench's temperatures (FastChat, llm_judge/common.py); other categories get FastChat's default.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class Question:
    """One question of one or two turns; `reference` has one correct answer per turn, or is empty."""

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Sampling temperature of the model under test."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Answer:
    """A model's answer: one text per turn of the question."""

    question_id: QuestionId
    model: str
    turns: tuple[str, ...]
    answer_id: str
    tstamp: float

    def row(self) -> Row:
        """The line of the answers file, in FastChat's schema."""
        choices = [{"index": 0, "turns": list(self.turns)}]
        return {
            "question_id": self.question_id,
            "answer_id": self.answer_id,
            "model_id": self.model,
            "choices": choices,
            "tstamp": self.tstamp,
        }


def answer_id(model: str, question_id: QuestionId, turns: Sequence[str]) -> str:
    """22 characters, as in FastChat; equal answers have equal ids."""
    return content_hash([model, question_id, list(turns)])[:22]


def content_hash(content: Any) -> str:
    """sha256 of `content` as JSON."""
    return json_sha256(content)


def load_questions(path: Path | None = None) -> list[Question]:
    """The questions of a file, or MT-Bench's 80, whose references are GPT-4's packaged answers.

    Raises:
        UserError: when the file is missing or empty, a field is missing or wrong, or an id occurs twice.
    """
    if path is not None:
        return _questions(path)
    references = {answer.question_id: answer.turns for answer in load_answers(asset_path("mtbench") / "gpt-4.jsonl")}
    return [
        Question(question.question_id, question.category, question.turns, references.get(question.question_id, ()))
        for question in _questions(asset_path("mtbench") / "question.jsonl")
    ]


def _questions(path: Path) -> list[Question]:
    rows = _rows(path, "questions")
    questions = [_question(row, f"{path}, question {number}") for number, row in enumerate(rows, start=1)]
    _check_unique(path, (question.question_id for question in questions))
    return questions


def _question(row: Row, where: str) -> Question:
    turns = _texts(row, "turns", where)
    if not 1 <= len(turns) <= 2 or not all(turn.strip() for turn in turns):
        raise UserError(f"{where}: turns must be a list of one or two texts that are not empty")
    reference = _texts(row, "reference", where) if row.get("reference") else ()
    if reference and len(reference) != len(turns):
        raise UserError(f"{where}: reference has {len(reference)} texts for {len(turns)} turns; give one per turn")
    return Question(_id(row, where), check_text(f"{where}: category", row.get("category")), turns, reference)


def load_answers(path: Path) -> list[Answer]:
    """The answers of a file in FastChat's schema; the first choice of each.

    Raises:
        UserError: when the file is missing or empty, a field is missing or wrong, or an id occurs twice.
    """
    answers = [_answer(row, f"{path}, answer {number}") for number, row in enumerate(_rows(path, "answers"), start=1)]
    _check_unique(path, (answer.question_id for answer in answers))
    return answers


def _answer(row: Row, where: str) -> Answer:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UserError(f'{where}: choices must be a list such as [{{"index": 0, "turns": [...]}}]')
    turns, model = _texts(choices[0], "turns", where), check_text(f"{where}: model_id", row.get("model_id"))
    question_id, tstamp = _id(row, where), row.get("tstamp", 0.0)
    found = str(row.get("answer_id") or answer_id(model, question_id, turns))
    return Answer(question_id, model, turns, found, tstamp if isinstance(tstamp, int | float) else 0.0)


@dataclass(frozen=True)
class JudgePrompt:
    """One of the packaged prompts; `template` has named fields in braces."""

    name: str
    system: str
    template: str


def load_prompts() -> dict[str, JudgePrompt]:
    """The packaged prompts for grading a single answer, by name."""
    rows = read_lines(asset_path("mtbench") / "judge_prompts.jsonl")
    prompts = [
        JudgePrompt(row["name"], row["system_prompt"], row["prompt_template"])
        for row in rows
        if row["type"] == "single"
    ]
    return {prompt.name: prompt for prompt in prompts}


def select(questions: Sequence[Question], ids: Iterable[str] | None) -> list[Question]:
    """The questions with these ids, in the file's order; all if `ids` is None.

    Raises:
        UserError: for an id that no question has.
    """
    if ids is None:
        return list(questions)
    wanted = {str(name) for name in ids}
    if unknown := wanted - {str(question.question_id) for question in questions}:
        known = f"{questions[0].question_id} .. {questions[-1].question_id}"
        raise UserError(f"no question has the id {', '.join(sorted(unknown))}; ids: {known}")
    return [question for question in questions if str(question.question_id) in wanted]


def _rows(path: Path, what: str) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{what} file {path} does not exist: give a file of JSON lines")
    if not (rows := read_lines(path)):
        raise UserError(f"{what} file {path} contains no JSON line: give at least one")
    return rows


def _id(row: Mapping[str, Any], where: str) -> QuestionId:
    found = row.get("question_id")
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise UserError(f"{where}: question_id={found} is not allowed: give a whole number or a text")
    return found


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    found = row.get(name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: {name} must be a list of texts")
    return tuple(found)


def _check_unique(path: Path, ids: Iterable[QuestionId]) -> None:
    seen: set[QuestionId] = set()
    for name in ids:
        if name in seen:
            raise UserError(f"{path}: question_id {name} occurs twice; keep one line of it")
        seen.add(name)
