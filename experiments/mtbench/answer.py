"""Let a model answer the questions, in batches; an interrupted run resumes at the first missing question."""

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
from sparsegrad.files import unreadable, write_json

_LATER = ("source", "dtype")  # settings that earlier versions did not store, or as `auto`


def answers_path(out: Path, name: str) -> Path:
    """The file of the answers of the model called `name`, in FastChat's layout.

    Raises:
        UserError: for a name that is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise fail("name", name, "use letters, digits and . _ + -, beginning with a letter or digit")
    return out / "model_answer" / f"{name}.jsonl"


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Store the settings of the answers in `path`; on later calls, check that they are the same.

    Raises:
        UserError: when a setting differs, the stored settings cannot be read, or they are of an earlier version, which
            stored neither the content of the model nor the dtype that `auto` stood for.
    """
    beside = path.with_suffix(".settings.json")
    if not beside.exists():
        return write_json(beside, settings)
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(beside, error) from error
    except ValueError as error:
        raise UserError(f"{beside} is damaged ({error}): delete it and {path.name}") from None
    unknown = {key: settings[key] for key in _LATER if before.get(key) in (None, "auto")}
    remedy = "choose another --name, or delete that file and its settings"
    # Where the content is known it decides: the folder may have moved.
    skipped = {*unknown} if "source" in unknown else {*unknown, "model"}
    for key in dict.fromkeys([*settings, *before]):
        if key not in skipped and before.get(key) != settings.get(key):
            raise UserError(f"{path} was started with {key}={before.get(key)}, not {settings.get(key)}: {remedy}")
    if unknown:
        raise UserError(
            f"{path} does not say by which content of {settings['model']} and in which dtype it was started: {remedy}; "
            f"if it was with these, set them in {beside}: {json.dumps(unknown)[1:-1]}"
        )
    return None


def describe(questions: Sequence[Question], **settings: Any) -> dict[str, Any]:
    """All settings that determine the answers, with a hash of the questions."""
    asked = [[question.question_id, question.category, list(question.turns)] for question in questions]
    return {**settings, "questions": content_hash(asked)[:16], "count": len(questions)}


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of questions with one temperature each, in a fixed order."""
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
) -> int:
    """Answer the questions that `path` lacks; returns the number of new answers.

    Batches do not depend on which answers exist, so a resumed run ends with the same answers as an uninterrupted one.
    Each answer is on disk before the next batch begins. `load` is called only if an answer is missing.
    """
    # A batch with one missing answer runs as a whole: sampling depends on the composition of the batch.
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
        print(f"{len(done)} of {len(questions)} questions answered")
    return added


def _answer_batch(batch: Sequence[Question], writer: Writer, name: str, seed: int) -> list[Answer]:
    conversations: list[list[str]] = [[] for _ in batch]
    for turn in range(max(len(question.turns) for question in batch)):
        # Questions of one turn drop out of the batch before the second turn.
        asked = [index for index, question in enumerate(batch) if turn < len(question.turns)]
        for index in asked:
            conversations[index].append(batch[index].turns[turn])
        # A seed of its own for each batch and turn: the result must not depend on which batches ran before.
        own_seed = int(content_hash([seed, [question.question_id for question in batch], turn])[:8], 16)
        texts = writer.write([conversations[index] for index in asked], batch[0].temperature, own_seed)
        for index, text in zip(asked, texts, strict=True):
            conversations[index].append(text)
    pairs = zip(batch, conversations, strict=True)
    # A conversation alternates: question, answer, question, answer.
    return [_make_answer(question, name, tuple(conversation[1::2])) for question, conversation in pairs]


def _make_answer(question: Question, name: str, turns: tuple[str, ...]) -> Answer:
    made = answer_id(name, question.question_id, turns)
    return Answer(question.question_id, name, turns, made, time.time())
