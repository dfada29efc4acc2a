"""Single-answer grading: a judge grades each turn of each answer from 1 to 10, with MT-Bench's prompts."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from experiments.mtbench.client import Client, Endpoint, QuestionFailedError, Reply, StoppedError
from experiments.mtbench.lines import Row, append_line, read_lines
from experiments.mtbench.schema import (
    WITH_REFERENCE,
    Answer,
    JudgePrompt,
    Question,
    QuestionId,
    content_hash,
)
from sparsegrad.errors import UserError

UNPARSABLE = -1  # as in FastChat, whose tools leave it out of the means
_GIVE_UP = 5  # failures in a row after which the grading stops
_CHARACTERS_A_TOKEN = 4  # for estimates
_GRADE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class Task:
    """One turn of one answer to be graded."""

    answer: Answer
    category: str
    turn: int
    prompt: str
    messages: tuple[dict[str, str], ...]

    def key(self, judge: str) -> str:
        """Key of the verdict in the cache: a hash of the judge's name and of the whole request."""
        return content_hash([judge, self.messages])


def judgments_path(folder: Path, judge: str) -> Path:
    """The file of the verdicts of `judge`, in FastChat's layout; special characters of the name become `_`."""
    return folder / "model_judgment" / f"{re.sub(r'[^A-Za-z0-9._+-]', '_', judge)}_single.jsonl"


def make_tasks(
    answers: Sequence[Answer], questions: Sequence[Question], prompts: Mapping[str, JudgePrompt]
) -> list[Task]:
    """All turns to be graded, each with the prompt for its category and turn.

    Raises:
        UserError: when an answer belongs to no question, or a question lacks a reference that its category needs.
    """
    known: dict[QuestionId, Question] = {question.question_id: question for question in questions}
    tasks = []
    for answer in answers:
        if (question := known.get(answer.question_id)) is None:
            raise UserError(
                f"answer to question {answer.question_id}: no such question; give the answered file as --questions"
            )
        turns = min(len(question.turns), len(answer.turns))
        tasks += [_task(answer, question, turn, prompts) for turn in range(1, turns + 1)]
    return tasks


def _task(answer: Answer, question: Question, turn: int, prompts: Mapping[str, JudgePrompt]) -> Task:
    needs = question.category in WITH_REFERENCE  # MT-Bench grades these categories against a reference answer
    if needs and not question.reference:
        raise UserError(
            f"question {question.question_id}: category {question.category} is graded against a reference: "
            'add "reference": [one text per turn] to it'
        )
    name = f"single{'-math' * needs}-v1{'-multi-turn' * (turn == 2)}"
    prompt = prompts[name]
    # The prompts for one turn use question and answer; those for two turns use the numbered fields.
    fields = {"question": question.turns[0], "answer": answer.turns[0]}
    for number in range(turn):
        fields[f"question_{number + 1}"] = question.turns[number]
        fields[f"answer_{number + 1}"] = answer.turns[number]
        if needs:
            fields[f"ref_answer_{number + 1}"] = question.reference[number]
    system = {"role": "system", "content": prompt.system}
    messages = (system, {"role": "user", "content": prompt.template.format(**fields)})
    return Task(answer, question.category, turn, name, messages)


def parse_grade(verdict: str) -> float | None:
    """The grade in `[[...]]`; None if there is none, it is not from 1 to 10, or two grades differ."""
    found = {float(text) for text in _GRADE.findall(verdict)}  # a verdict may repeat its grade
    if len(found) != 1:
        return None
    grade = found.pop()
    return grade if 1 <= grade <= 10 else None


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a grading: prompt tokens of four characters each, and as many completion tokens as allowed."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    money: float | None


def estimate(tasks: Sequence[Task], max_tokens: int, prices: tuple[float, float] | None) -> Estimate:
    """Requests, tokens and, if prices per million tokens (prompt, completion) are given, money."""
    characters = sum(len(message["content"]) for task in tasks for message in task.messages)
    prompt, completion = -(-characters // _CHARACTERS_A_TOKEN), len(tasks) * max_tokens  # rounded up
    return Estimate(len(tasks), prompt, completion, cost(prompt, completion, prices))


def cost(prompt: int, completion: int, prices: tuple[float, float] | None) -> float | None:
    """Money for these token counts at prices per million (prompt, completion); None without prices."""
    return None if prices is None else (prompt * prices[0] + completion * prices[1]) / 1e6


@dataclass
class Tally:
    """Counts of one grading; `failed` has one line for each turn without a reply."""

    graded: int = 0
    unparsable: int = 0
    failed: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_a_row: int = 0


class Grading:
    """The verdicts of one judge in one file, which is also a cache: known verdicts are not requested again."""

    def __init__(self, path: Path, judge: str, *, retry_gaps: bool = False) -> None:
        self.path, self.judge = path, judge
        # Without a key a row is not ours, but FastChat's. Forgetting verdicts without a grade makes them asked again.
        rows = [row for row in read_lines(path) if "key" in row]
        rows = [row for row in rows if not (retry_gaps and row.get("score") == UNPARSABLE)]
        self._rows = {row["key"]: row for row in rows}
        self._seen = {(row["key"], row.get("answer_id"), row.get("model")) for row in rows}

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks without a known verdict; for the others, the known verdict is recorded for their answer."""
        asked = []
        for task in tasks:
            known = self._rows.get(task.key(self.judge))
            if known is None:
                asked.append(task)
            elif (known["key"], task.answer.answer_id, task.answer.model) not in self._seen:
                self._copy_verdict(task, known)
        return asked

    def _copy_verdict(self, task: Task, known: Row) -> None:
        row = {**known, "question_id": task.answer.question_id, "model": task.answer.model}
        self._append({**row, "answer_id": task.answer.answer_id, "turn": task.turn})

    def _append(self, row: Row) -> None:
        append_line(self.path, row)
        self._rows[row["key"]] = row
        self._seen.add((row["key"], row["answer_id"], row["model"]))

    def put(self, task: Task, reply: Reply, attempts: int) -> float | None:
        """Append one verdict in FastChat's schema, with a few more fields; returns its grade."""
        grade = parse_grade(reply.text)
        row = {
            "question_id": task.answer.question_id,
            "model": task.answer.model,
            "judge": [self.judge, task.prompt],
            "user_prompt": task.messages[-1]["content"],
            "judgment": reply.text,
            "score": UNPARSABLE if grade is None else grade,
            "turn": task.turn,
            "tstamp": time.time(),
            "category": task.category,
            "answer_id": task.answer.answer_id,
            "judge_model": reply.model,
            "asked": attempts,
            "key": task.key(self.judge),
        }
        self._append(row)
        return grade


def grade(
    tasks: Sequence[Task],
    endpoint: Endpoint,
    grading: Grading,
    *,
    workers: int = 4,
) -> Tally:
    """Ask the judge to grade every task; each verdict is on disk as soon as it arrives.

    A turn without a reply is left ungraded, and the next call asks for it again.

    Raises:
        UserError: when no request can succeed, or five in a row failed.
    """
    tally, lock = Tally(), threading.Lock()
    with Client(endpoint) as client, ThreadPoolExecutor(workers) as pool:

        def work(task: Task) -> None:
            try:
                outcome = _grade_one(task, client, grading)
                with lock:
                    _count(tally, task, outcome)
                    print(f"{tally.graded + tally.unparsable + len(tally.failed)} of {len(tasks)} turns asked")
            except StoppedError:
                return  # the thread that stopped the work reports the reason
            except BaseException:
                client.stop.set()  # before this thread takes its next task
                raise

        # One task per prompt: equal answers are graded once, and `missing` copies the verdict to the others.
        distinct = {task.key(grading.judge): task for task in reversed(tasks)}.values()
        _run_all(work, distinct, client, pool)
    return tally


def _run_all(work: Callable[[Task], None], tasks: Iterable[Task], client: Client, pool: ThreadPoolExecutor) -> None:
    """Call `work` on every task in the threads of `pool`; the first error ends them all and is raised."""
    futures = [pool.submit(work, task) for task in tasks]
    try:
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    finally:
        # `stop` wakes threads that wait between two attempts; otherwise the pool could not shut down.
        client.stop.set()
        pool.shutdown(cancel_futures=True)


Outcome = tuple[list[Reply], float | None] | str


def _grade_one(task: Task, client: Client, grading: Grading) -> Outcome:
    """Ask once, and again if the verdict contains no grade; a string tells why there is no verdict."""
    replies: list[Reply] = []
    try:
        for _ in range(2):
            replies.append(client.ask(task.messages))
            if parse_grade(replies[-1].text) is not None:
                break
    except QuestionFailedError as error:
        if not replies:
            return str(error)
    return replies, grading.put(task, replies[-1], len(replies))


def _count(tally: Tally, task: Task, outcome: Outcome) -> None:
    # In a row, because a dead server fails every request, while a single bad question does not.
    if isinstance(outcome, str):
        where = f"question {task.answer.question_id}, turn {task.turn}"
        tally.failed.append(f"{where}: {outcome}")
        tally.in_a_row += 1
        if tally.in_a_row >= _GIVE_UP:
            raise UserError(
                f"the judge failed {_GIVE_UP} times in a row, last on {tally.failed[-1]}; the same command continues"
            )
        return
    replies, found = outcome
    tally.in_a_row = 0
    tally.graded += found is not None
    tally.unparsable += found is None
    tally.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
    tally.completion_tokens += sum(reply.completion_tokens for reply in replies)
