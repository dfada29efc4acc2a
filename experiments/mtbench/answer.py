"""Let a model answer the questions: batched, and resumable question by question."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.mtbench.generation import Writer
from experiments.mtbench.lines import append_line, read_lines
from experiments.mtbench.schema import Answer, Question, answer_id, content_hash
from sparsegrad.errors import UserError, fail
from sparsegrad.files import write_json

Say = Callable[[str], None]


def answers_path(out: Path, name: str) -> Path:
    """Where the answers of the model called `name` lie: FastChat's layout.

    Raises:
        UserError: for a name that is no plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise fail("name", name, "use letters, digits and . _ + -, beginning with a letter or digit")
    return out / "model_answer" / f"{name}.jsonl"


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write down how the answers in `path` are made; refuse to add answers made in another way.

    Raises:
        UserError: naming the setting that differs.
    """
    beside = path.with_suffix(".settings.json")
    if not beside.exists():
        return write_json(beside, settings)
    try:
        before = json.loads(beside.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{beside} cannot be read ({error}): delete it and {path.name}") from None
    for key in settings.keys() | before.keys():
        if before.get(key) != settings.get(key):
            raise UserError(
                f"{path} was begun with {key}={before.get(key)}, not {settings.get(key)}: choose another --name, "
                "or delete that file and its settings"
            )
    return None


def describe(questions: Sequence[Question], **settings: Any) -> dict[str, Any]:
    """The settings that decide what the answers are."""
    asked = [[question.question_id, question.category, list(question.turns)] for question in questions]
    return {**settings, "questions": content_hash(asked)[:16], "count": len(questions)}


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of one temperature each, in a fixed order."""
    ordered = sorted(questions, key=lambda question: question.temperature)
    for _, group in groupby(ordered, key=lambda question: question.temperature):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def answer_questions(
    questions: Sequence[Question],
    load: Callable[[], Writer],
    path: Path,
    *,
    name: str,
    size: int,
    seed: int,
    say: Say = print,
) -> int:
    """Answer what `path` lacks, and return how many were added; `load` is called only if something is missing.

    Batches do not depend on what is there already, so a run that was stopped and called again ends with the answers
    of one that was not. Each answer is on disk before the next batch begins.
    """
    done = {row.get("question_id") for row in read_lines(path)}
    todo = [batch for batch in batches(questions, size) if any(q.question_id not in done for q in batch)]
    writer, added = load() if todo else None, 0
    for batch in todo:
        assert writer is not None
        for found in _answer_batch(batch, writer, name, seed):
            if found.question_id not in done:
                append_line(path, found.row())
                done.add(found.question_id)
                added += 1
        say(f"{len(done)} of {len(questions)} questions answered")
    return added


def _answer_batch(batch: Sequence[Question], writer: Writer, name: str, seed: int) -> list[Answer]:
    conversations: list[list[str]] = [[] for _ in batch]
    for turn in range(max(len(question.turns) for question in batch)):
        asked = [index for index, question in enumerate(batch) if turn < len(question.turns)]
        for index in asked:
            conversations[index].append(batch[index].turns[turn])
        own_seed = _seed(seed, batch, turn)
        texts = writer.write([conversations[index] for index in asked], batch[0].temperature, own_seed)
        for index, text in zip(asked, texts, strict=True):
            conversations[index].append(text)
    pairs = zip(batch, conversations, strict=True)
    return [_made(question, name, tuple(conversation[1::2])) for question, conversation in pairs]


def _seed(seed: int, batch: Sequence[Question], turn: int) -> int:
    return int(content_hash([seed, [question.question_id for question in batch], turn])[:8], 16)


def _made(question: Question, name: str, turns: tuple[str, ...]) -> Answer:
    made = answer_id(name, question.question_id, turns)
    return Answer(question.question_id, name, turns, made, time.time())
