"""Grading against a real server on loopback: what it may answer, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from judge_server import Judge, Says, serve
from run_fixtures import ROOT, environment, free_port

from experiments.mtbench import compute_scores, side_by_side
from experiments.mtbench import judge as judging
from experiments.mtbench.cli import main
from experiments.mtbench.client import seconds_of
from experiments.mtbench.judge import parse_grade
from experiments.mtbench.lines import read_lines
from experiments.mtbench.schema import Answer, JudgePrompt, answer_id

KEY = "sk-secret-0123456789"
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


@pytest.fixture(autouse=True)
def _own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged prompts are an asset; these tests need none."""
    monkeypatch.setattr("experiments.mtbench.cli.load_prompts", lambda: PROMPTS)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge() -> Iterator[Judge]:
    with serve() as served:
        yield served


def write_answers(folder: Path, name: str = "tiny", said: str = "said") -> Path:
    """An answers file with one answer a question."""
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
    """The judge command with short pauses; the exit status."""
    fixed = ("judge", "--yes", "--model", "j", "--backoff", "0.01", "--questions", str(folder / "questions.jsonl"))
    answers = str(folder / "model_answer" / f"{name}.jsonl")
    return main([*fixed, "--answers", answers, "--base-url", url, *more])


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "model_judgment" / "j_single.jsonl")


def test_every_turn_is_graded_with_the_prompt_of_its_category(folder: Path, judge: Judge) -> None:
    assert run(folder, judge.url) == 0
    found = {(row["question_id"], row["turn"]): row for row in verdicts(folder)}
    assert {key: row["judge"] for key, row in found.items()} == {
        (1, 1): ["j", "single-v1"],
        (1, 2): ["j", "single-v1-multi-turn"],
        (2, 1): ["j", "single-math-v1"],
        (2, 2): ["j", "single-math-v1-multi-turn"],
        ("x", 1): ["j", "single-v1"],
    }
    assert found[2, 1]["user_prompt"] == "1 + 1? ref: REF-TWO answer: said 2.0"
    assert found[1, 2]["user_prompt"] == "Write a line.|said 1.0|Again.|said 1.1"
    assert {row["judge_model"] for row in found.values()} == {"judge-2024"}
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 for body in judge.asked)
    assert all([message["role"] for message in body["messages"]] == ["system", "user"] for body in judge.asked)


def test_no_question_is_judged_twice(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, judge.url)
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS
    assert "5 judged before; to ask: 0 requests" in capsys.readouterr().out


def test_equal_answers_of_another_model_take_the_known_verdict(folder: Path, judge: Judge) -> None:
    run(folder, judge.url)
    write_answers(folder, "other")
    run(folder, judge.url, name="other")
    run(folder, judge.url, name="other")
    assert len(judge.asked) == TURNS
    assert [(one.model, one.judged) for one in compute_scores(folder)] == [("other", TURNS), ("tiny", TURNS)]
    assert len(verdicts(folder)) == 2 * TURNS


def test_a_verdict_counts_only_for_the_answer_it_was_given_for(folder: Path, judge: Judge) -> None:
    run(folder, judge.url)
    write_answers(folder, said="something else")
    (one,) = compute_scores(folder)
    assert (one.judge, one.judged, one.unjudged) == (None, 0, TURNS)
    run(folder, judge.url)
    assert len(judge.asked) == 2 * TURNS
    assert compute_scores(folder)[0].judged == TURNS


def test_another_judge_is_asked_anew(folder: Path, judge: Judge) -> None:
    run(folder, judge.url)
    run(folder, judge.url, "--model", "org/k")
    assert len(judge.asked) == 2 * TURNS
    assert [one.judge for one in compute_scores(folder)] == ["j", "org/k"]
    assert (folder / "model_judgment" / "org_k_single.jsonl").exists()


@pytest.mark.parametrize(
    "bad",
    [
        Says("down", status=500),
        Says("wait", status=429, headers={"Retry-After": "0"}),
        Says(raw=b"<html>not json"),
        Says(raw=b'{"choices": []}'),
        Says(raw=b"[1]"),
        Says(raw=b'{"choices": [{"message": {"content": 7}}]}'),
        Says(seconds=1.0),
    ],
    ids=["500", "429", "html", "no choice", "list", "no text", "timeout"],
)
def test_trouble_that_passes_is_tried_again(folder: Path, judge: Judge, bad: Says) -> None:
    judge.script = [bad, bad]
    assert run(folder, judge.url, "--workers", "1", "--timeout", "0.4") == 0
    assert len(judge.asked) == TURNS + 2
    assert compute_scores(folder)[0].judged == TURNS


def test_retry_after_holds_all_workers(folder: Path, judge: Judge) -> None:
    judge.script = [Says("slow down", status=429, headers={"Retry-After": "1"})]
    assert run(folder, judge.url, "--workers", "1") == 0
    assert judge.times[1] - judge.times[0] >= 0.95


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < seconds_of(soon) <= 30
    assert [seconds_of(text) for text in ("12", "-3", None, "", "soon", "1e400")] == [12, 0, 0, 0, 0, 0]


def test_a_wait_of_hours_ends_with_one_line(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    judge.otherwise = Says("quota", status=429, headers={"Retry-After": "7200"})
    assert run(folder, judge.url, "--workers", "1") == 2
    assert "asks to wait 7200 s" in capsys.readouterr().err
    assert len(judge.asked) == 1


def test_the_rate_limit_spaces_requests(folder: Path, judge: Judge) -> None:
    run(folder, judge.url, "--per-minute", "600", "--workers", "5")
    assert judge.times[-1] - judge.times[0] >= 0.38  # five requests, a tenth of a second apart


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_at_once_and_is_not_shown(
    folder: Path, judge: Judge, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.otherwise = Says(f"wrong key {KEY}", status=status)
    assert run(folder, judge.url, "--key-env", "JUDGE_KEY", "--workers", "1") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "refuses the key" in captured.err
    assert KEY not in captured.err + captured.out
    assert len(judge.asked) == 1


def test_the_key_is_sent_and_never_stored(folder: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run(folder, judge.url)
    assert set(judge.keys) == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_without_a_key_none_is_sent(folder: Path, judge: Judge) -> None:
    run(folder, judge.url)
    assert set(judge.keys) == {None}


@pytest.mark.parametrize("text", ["no grade here", "[[0]]", "[[11]]", "[[5]] or [[6]]", "[5]", "[[ 5 ]]", "", None])
def test_a_verdict_without_a_grade_is_asked_once_more_and_then_a_gap(
    folder: Path, judge: Judge, text: str | None
) -> None:
    judge.for_text = {"said x.0": Says(text)}
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS + 1
    (gap,) = (row for row in verdicts(folder) if row["question_id"] == "x")
    assert (gap["score"], gap["judgment"], gap["asked"]) == (-1, text or "", 2)
    (one,) = compute_scores(folder)
    assert (one.judged, one.unparsable, one.unjudged, one.mean) == (TURNS - 1, 1, 0, 7.0)


def test_a_gap_stays_until_it_is_to_be_asked_again(folder: Path, judge: Judge) -> None:
    judge.for_text = {"said x.0": Says("none")}
    run(folder, judge.url)
    judge.for_text = {}
    run(folder, judge.url)
    assert compute_scores(folder)[0].unparsable == 1
    run(folder, judge.url, "--retry-gaps")
    assert (compute_scores(folder)[0].unparsable, compute_scores(folder)[0].judged) == (0, TURNS)


def test_the_second_try_can_bring_the_grade(folder: Path, judge: Judge) -> None:
    judge.script = [Says("hm"), Says("Rating: [[3.5]]")]
    run(folder, judge.url, "--workers", "1")
    assert sorted(row["score"] for row in verdicts(folder)) == [3.5, 7, 7, 7, 7]


@pytest.mark.parametrize(
    ("text", "grade"), [("[[10]]", 10), ("[[1]] so [[1]]", 1), ("[[7.5]]", 7.5), ("[[10.5]]", None)]
)
def test_grades(text: str, grade: float | None) -> None:
    assert parse_grade(text) == grade


def test_one_failing_question_does_not_stop_the_rest(
    folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.for_text = {"said x.0": Says("too long", status=400)}
    assert run(folder, judge.url) == 1
    assert "no verdict: question x, turn 1: status 400: too long" in capsys.readouterr().err
    (one,) = compute_scores(folder)
    assert (one.judged, one.unjudged) == (TURNS - 1, 1)
    judge.for_text = {}
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS + 1


def test_an_unreachable_judge_ends_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, f"http://127.0.0.1:{free_port()}/v1", "--attempts", "2", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "failed 5 times in a row" in error
    assert "ConnectError" in error
    assert not verdicts(folder)


def test_a_wrong_address_ends_at_once(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, judge.url.replace("/v1", "/v9"), "--workers", "1") == 2
    assert "check --base-url and --model" in capsys.readouterr().err
    assert len(judge.asked) == 1


def test_a_killed_grading_goes_on_where_it_was(folder: Path, judge: Judge) -> None:
    judge.otherwise = Says(seconds=0.3)
    folders = [str(ROOT / "tests" / name) for name in ("experiments", "support")]
    code = f"import sys; sys.path[:0] = {folders}; import test_mtbench_judge as t; t.grade_here()"
    env = environment(PYTHONPATH=str(ROOT), FOLDER=str(folder), URL=judge.url)
    process = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT)
    path = folder / "model_judgment" / "j_single.jsonl"
    deadline = time.monotonic() + 60
    while not read_lines(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("ab") as file:
        file.write(b'{"question_id": 2, "mod')  # what a kill in the middle of a write leaves
    before = len(verdicts(folder))
    assert 0 < before < TURNS
    judge.otherwise, judge.asked = Says(), []
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS - before
    assert len(verdicts(folder)) == TURNS


def grade_here() -> None:
    """Of the process that is killed."""
    import experiments.mtbench.cli as cli

    cli.load_prompts = lambda: PROMPTS
    run(Path(os.environ["FOLDER"]), os.environ["URL"], "--workers", "1")


def test_the_estimate_comes_first_and_asks_nobody(
    folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, judge.url, "--dry-run", "--price-in", "2", "--price-out", "10", "--max-tokens", "1000") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "to ask: 5 requests" in said
    assert "at most 5,000 completion tokens, at most 0.05" in said
    assert not judge.asked


def test_nothing_starts_unasked(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["judge", "--model", "j", "--base-url", judge.url, "--questions", str(folder / "questions.jsonl")]
    assert main([*arguments, "--answers", str(folder / "model_answer" / "tiny.jsonl")]) == 2
    assert "--yes" in capsys.readouterr().err
    assert not judge.asked


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--price-in", "1"), "both --price-in and --price-out"),
        (("--base-url", "localhost:80/v1"), "base_url=localhost:80/v1 is not allowed"),
        (("--base-url", "http://u:p@h/v1"), "must hold no user"),
        (("--per-minute", "0"), "per_minute=0.0 is not allowed"),
        (("--workers", "0"), "workers=0 is not allowed"),
        (("--attempts", "0"), "attempts=0 is not allowed"),
        (("--timeout", "nan"), "timeout=nan is not allowed"),
        (("--answers", "nowhere.jsonl"), "answers file nowhere.jsonl does not exist"),
    ],
)
def test_bad_options_end_with_one_line(
    folder: Path, judge: Judge, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, judge.url, *more) == 2
    assert message in capsys.readouterr().err
    assert not judge.asked


def test_a_needed_reference_must_be_there(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "reference": []} for row in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, judge.url) == 2
    assert "question 2: category math is graded against a reference" in capsys.readouterr().err


def test_means_by_turn_and_category(folder: Path, judge: Judge) -> None:
    grades = {"said 1.0|": 4, "said 2.0|": 6, "said 1.0": 2, "said 2.0": 8, "said x.0": 10}
    judge.for_text = {text: Says(f"[[{grade}]]") for text, grade in grades.items()}
    run(folder, judge.url)
    (one,) = compute_scores(folder)
    assert one.turn1 == pytest.approx((2 + 8 + 10) / 3)
    assert one.turn2 == pytest.approx((4 + 6) / 2)
    assert one.mean == pytest.approx(30 / 5)
    assert one.categories == {"math": 7, "own": 10, "writing": 3}
    assert one.label == f"j, {datetime.now(UTC).date()}"


def test_show_says_what_is_not_judged(folder: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    write_answers(folder, "bare", "unseen")
    run(folder, judge.url)
    (bare, tiny) = compute_scores(folder)
    assert (bare.label, bare.mean, bare.unjudged, tiny.mean) == ("not judged", None, TURNS, 7.0)
    assert main(["show", "--out", str(folder)]) == 0
    assert "not judged" in " ".join(capsys.readouterr().out.split())


def test_answers_side_by_side(folder: Path) -> None:
    write_answers(folder, "other", "replied")
    from experiments.mtbench.schema import load_questions

    questions = load_questions(folder / "questions.jsonl")
    (one,) = side_by_side(folder, [2], questions)
    assert one.turns == ("1 + 1?", "And 2 + 2?")
    assert one.answers == {"other": ("replied 2.0", "replied 2.1"), "tiny": ("said 2.0", "said 2.1")}
    assert [row.question_id for row in side_by_side(folder, None, questions)] == [1, 2, "x"]


def test_estimate_rounds_up() -> None:
    task = judging.Task(Answer(1, "m", ("a",), "i", 0.0), "own", 1, "p", ({"role": "user", "content": "12345"},))
    found = judging.estimate([task], 10, (1e6, 2e6))
    assert (found.prompt_tokens, found.completion_tokens, found.money) == (2, 10, 22.0)
