"""results/report/answers.html: the answers of the methods side by side (the paper's Appendix E)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.mtbench.schema import load_questions
from experiments.mtbench.scores import ModelScores, SideBySide, compute_scores, side_by_side
from sparsegrad.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
NAME = "answers.html"


def has_answers(results: Path) -> bool:
    """Whether there are chosen questions and answers to them."""
    folder = results / "mtbench"
    return (folder / "questions.jsonl").is_file() and any((folder / "model_answer").glob("*.jsonl"))


def write_answers_page(results: Path) -> Path | None:
    """Render the page from results/mtbench; returns None and removes the page if there are no answers.

    The questions come from results/mtbench/questions.jsonl, so that no asset is needed.

    Raises:
        UserError: for a damaged file.
    """
    path = results / "report" / NAME
    if not has_answers(results):
        path.unlink(missing_ok=True)  # an older page would show answers that no longer exist
        return None
    folder = results / "mtbench"
    chosen = side_by_side(folder, questions=load_questions(folder / "questions.jsonl"))
    names = sorted({name for one in chosen for name in one.answers})
    models = [_describe_model(name, folder) | _count_texts(name, chosen) for name in names]
    facts = {
        "chosen": [_describe_question(one) for one in chosen],
        "models": models,
        "judges": _format_grades(compute_scores(folder)),
    }
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    write_text(path, environment.get_template("answers.html.j2").render(facts) + "\n")
    return path


def _describe_model(name: str, folder: Path) -> dict[str, Any]:
    """A model's name, and the settings of its answers in one line."""
    try:
        settings = json.loads((folder / "model_answer" / f"{name}.settings.json").read_text())
    except (OSError, ValueError):
        return {"name": name, "how": "not recorded"}
    names = ("model", "format", "max_new_tokens", "seed", "dtype")
    return {"name": name, "how": ", ".join(f"{key} {settings[key]}" for key in names if key in settings)}


def _count_texts(name: str, chosen: Sequence[SideBySide]) -> dict[str, int]:
    """How many answers of a model there are, and how many of them are empty."""
    texts = [text for one in chosen for text in one.answers.get(name, ())]
    return {"answers": len(texts), "empty": sum(not text.strip() for text in texts)}


def _describe_question(one: SideBySide) -> dict[str, Any]:
    """A question with its turns: the answers that have text, and the names of the models whose answer is empty.

    An answer to fewer turns than the question has, as the judge accepts it, is empty in the others.
    """
    turns = []
    for index, question in enumerate(one.turns):
        texts = {model: answers[index] if index < len(answers) else "" for model, answers in one.answers.items()}
        empty = [model for model, text in texts.items() if not text.strip()]
        turns.append(
            {"question": question, "texts": {m: t for m, t in texts.items() if m not in empty}, "empty": empty}
        )
    return {"id": one.question_id, "category": one.category, "turns": turns}


def _format_grades(found: Sequence[ModelScores]) -> dict[str, str]:
    """Model -> mean grade and judge, as text."""
    return {one.model: one.label if one.mean is None else f"{one.mean:.2f} ({one.label})" for one in found}
