"""The questions, references and prompts of MT-Bench, as they are downloaded."""

from __future__ import annotations

import pytest

from experiments.mtbench.schema import TEMPERATURES, load_prompts, load_questions
from sparsegrad.assets.download import assets_root, problem
from sparsegrad.assets.table import ASSETS

needs_asset = pytest.mark.skipif(
    problem(ASSETS["mtbench"], assets_root()) is not None, reason="needs `python -m sparsegrad.assets mtbench`"
)


@needs_asset
def test_the_packaged_questions_references_and_prompts() -> None:
    questions = load_questions()
    assert len(questions) == 80
    assert {question.category for question in questions} == set(TEMPERATURES)
    assert all(len(question.turns) == 2 for question in questions)
    assert sum(bool(question.reference) for question in questions) == 30
    assert set(load_prompts()) == {
        "single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn",
    }  # fmt: skip


@needs_asset
def test_the_packaged_prompts_take_every_answer() -> None:
    from experiments.mtbench.judge import make_tasks
    from experiments.mtbench.schema import Answer

    answers = [Answer(one.question_id, "m", ("FIRST {x}", "SECOND"), "i", 0.0) for one in load_questions()]
    tasks = make_tasks(answers, load_questions(), load_prompts())
    assert len(tasks) == 160
    assert all(("FIRST {x}" in task.messages[1]["content"]) for task in tasks)
    assert all(("SECOND" in task.messages[1]["content"]) == (task.turn == 2) for task in tasks)
    with_reference = [task for task in tasks if "Reference" in task.messages[1]["content"]]
    assert len(with_reference) == 60
