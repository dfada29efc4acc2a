"""Grading against a real server on loopback: prompts, grades, the cache of verdicts, and scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from judge_cases import PROMPTS, QUESTIONS, TURNS, run, verdicts, write_answers
from judge_server import Judge, Says, serve
from quick_python import quick_python
from run_fixtures import ROOT, environment

from experiments.mtbench import compute_scores, side_by_side
from experiments.mtbench import judge as judging
from experiments.mtbench.cli import main
from experiments.mtbench.judge import parse_grade
from experiments.mtbench.lines import append_line, only_writer, read_lines
from experiments.mtbench.schema import Answer, load_answers
from sparsegrad.errors import BUSY

pytestmark = pytest.mark.usefixtures("own_prompts")


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


def test_a_killed_grading_goes_on_where_it_was(folder: Path, judge: Judge) -> None:
    judge.otherwise = Says(seconds=0.3)
    folders = [str(ROOT / "tests" / name) for name in ("experiments", "support")]
    code = f"import sys; sys.path[:0] = {folders}; import test_mtbench_judge as t; t.grade_here()"
    env = environment(PYTHONPATH=str(ROOT), FOLDER=str(folder), URL=judge.url)
    process = subprocess.Popen([quick_python(), "-c", code], env=env, cwd=ROOT)
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
    with serve() as later:  # the first one may still get a request that the killed process sent
        assert run(folder, later.url) == 0
        assert len(later.asked) == TURNS - before
    assert len(verdicts(folder)) == TURNS


def test_two_processes_do_not_pay_for_the_same_verdicts(folder: Path, judge: Judge) -> None:
    path = folder / "model_judgment" / "j_single.jsonl"
    with only_writer(path, "tiny"):
        assert run(folder, judge.url) == BUSY
    assert not judge.asked
    with only_writer(path, "another model"):
        assert run(folder, judge.url) == 0


def test_verdicts_that_came_during_the_question_whether_to_start_are_not_asked_again(
    folder: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_elsewhere(yes: bool) -> None:
        monkeypatch.setattr("experiments.mtbench.cli._confirm", lambda yes: None)
        assert run(folder, judge.url) == 0

    monkeypatch.setattr("experiments.mtbench.cli._confirm", start_elsewhere)
    assert run(folder, judge.url) == 0
    assert len(judge.asked) == TURNS


def grade_here() -> None:
    """Runs in the process that is killed."""
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


@pytest.mark.parametrize(
    ("change", "named"),
    [({"judge": None}, "judge"), ({"judge": []}, "judge"), ({"model": None, "turn": "1"}, "model, turn")],
)
def test_a_damaged_verdict_is_one_error(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: str
) -> None:
    answer = load_answers(folder / "model_answer" / "tiny.jsonl")[0]
    fastchats = {"question_id": 1, "model": "tiny", "judge": ["j", "single-v1"], "score": 7, "turn": 1, "tstamp": 1.0}
    ours = {**fastchats, "category": "writing", "answer_id": answer.answer_id, "judge_model": "j-2024"}
    path = folder / "model_judgment" / "j_single.jsonl"
    append_line(path, {"judgment": "of another program"})
    append_line(path, ours)
    assert compute_scores(folder)[0].judged == 1
    append_line(path, {**ours, **change})
    assert main(["show", "--out", str(folder)]) == 2
    assert f"verdict 3: {named} is missing" in capsys.readouterr().err


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
