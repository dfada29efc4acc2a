"""Appendix E's page: it shows every answer unchanged, and is removed when there are no answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from run_fixtures import ROOT

from experiments.mtbench.schema import Answer, load_answers, load_questions
from experiments.report.answers_page import write_answers_page

TEXTS = {"tiny": ("<b>two</b>", "a line\nand another"), "tiny-lora": ("2 & 2", "")}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "mtbench" / "model_answer"
    folder.mkdir(parents=True)
    question = {"question_id": 7, "category": "math", "turns": ["1 + 1?", "And why?"]}
    (tmp_path / "mtbench" / "questions.jsonl").write_text(json.dumps(question) + "\n")
    for name, turns in TEXTS.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(Answer(7, name, turns, name, 1.0).row()) + "\n")
    settings = {"model": "runs/abc/model", "format": "inst", "max_new_tokens": 80, "seed": 42}
    (folder / "tiny.settings.json").write_text(json.dumps(settings))
    return tmp_path


def test_questions_and_answers_stand_side_by_side_as_they_are(results: Path) -> None:
    path = write_answers_page(results)
    assert path is not None
    page = path.read_text()
    for text in (
        "1 + 1?",
        "And why?",
        "&lt;b&gt;two&lt;/b&gt;",
        "a line\nand another",
        "2 &amp; 2",
        "No text from tiny-lora.",
    ):
        assert text in page
    assert "<b>two</b>" not in page  # escaped
    assert "<b>1 of 4 answers have no text:</b>" in page
    rows = [row.split("</tr>")[0] for row in page.split("<tr><td>")[1:]]
    assert [re.findall(r">([^<]+)<", f">{row}") for row in rows] == [
        ["tiny", "2", "0", "not judged", "model runs/abc/model, format inst, max_new_tokens 80, seed 42"],
        ["tiny-lora", "2", "1", "not judged", "not recorded"],
    ]


def test_an_answer_to_fewer_turns_is_empty_in_the_others(results: Path) -> None:
    path = results / "mtbench" / "model_answer" / "tiny-lora.jsonl"
    path.write_text(json.dumps(Answer(7, "tiny-lora", ("2 & 2",), "a", 1.0).row()) + "\n")
    page = write_answers_page(results)
    assert page is not None
    assert "No text from tiny-lora." in page.read_text()


def test_links_lead_to_what_is_there(results: Path) -> None:
    path = write_answers_page(results)
    assert path is not None
    links = [part.split('"')[0] for part in path.read_text().split('href="')[1:]]
    local = [link for link in links if not link.startswith(("http", "data:"))]
    assert len(local) == 4
    assert all((path.parent / link).is_file() for link in local if link != "index.html")


def test_without_answers_there_is_no_page_and_no_link(results: Path) -> None:
    write_answers_page(results)
    for path in (results / "mtbench" / "model_answer").glob("*.jsonl"):
        path.unlink()
    assert write_answers_page(results) is None
    assert not (results / "report" / "answers.html").exists()


def test_the_committed_answers_are_to_the_committed_questions() -> None:
    folder = ROOT / "results" / "mtbench"
    questions = {one.question_id: one for one in load_questions(folder / "questions.jsonl")}
    paths = sorted((folder / "model_answer").glob("*.jsonl"))
    if not paths:
        pytest.skip("no answers are committed: docs/mtbench.md has the commands")
    for path in paths:
        answers = load_answers(path)
        assert {one.question_id for one in answers} == set(questions)
        assert all(len(one.turns) == len(questions[one.question_id].turns) for one in answers)
        assert path.with_suffix(".settings.json").is_file()
