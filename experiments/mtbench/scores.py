"""Mean grades and answers side by side: the data of Table 6 and Appendix E."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from types import UnionType

from experiments.mtbench.lines import Row, read_lines
from experiments.mtbench.schema import Answer, Question, QuestionId, load_answers, load_questions, select
from sparsegrad.errors import UserError

# The fields of a verdict that are used here, and their types. `judge` is the judge's name and that of the prompt.
_FIELDS: Mapping[str, type | UnionType] = {
    "question_id": int | str,
    "model": str,
    "judge": list,
    "score": int | float,
    "turn": int,
    "tstamp": int | float,
    "category": str,
    "answer_id": str,
    "judge_model": str | None,
}


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model by one judge; for a model without a judge, `judge` and the means are None.

    Attributes:
        turn1, turn2, mean: mean grades from 1 to 10; None if nothing is graded.
        categories: mean grade by category.
        questions: mean grade by question's ID, over its turns.
        judged, unparsable, unjudged: numbers of turns with a grade, with a verdict but no grade, without a verdict.
        judge, judge_model: the judge's name in the request, and the name that the server reported.
        date: day (UTC) of the last verdict.
    """

    model: str
    judge: str | None
    turn1: float | None
    turn2: float | None
    mean: float | None
    categories: Mapping[str, float]
    judged: int
    unparsable: int
    unjudged: int
    judge_model: str | None = None
    date: str | None = None
    questions: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Judge and date, as tables show them."""
        return "not judged" if self.judge is None else f"{self.judge}, {self.date}"


def compute_scores(folder: Path | str) -> list[ModelScores]:
    """Every model in `folder`, once for each judge that graded it; sorted by model and judge.

    A verdict counts only for the exact answer that was judged.

    Raises:
        UserError: for a damaged file.
    """
    found: list[ModelScores] = []
    judgments = _by_judge(Path(folder))
    for path in sorted((Path(folder) / "model_answer").glob("*.jsonl")):
        answers = load_answers(path)
        own = {judge: _select_verdicts(rows, answers) for judge, rows in judgments.items()}
        graded = [_score(path.stem, judge, rows, answers) for judge, rows in sorted(own.items()) if rows]
        found += graded or [_score(path.stem, None, [], answers)]
    return found


def _by_judge(folder: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for path in sorted((folder / "model_judgment").glob("*_single.jsonl")):
        for number, row in enumerate(read_lines(path), start=1):
            if "answer_id" in row:  # FastChat's own verdicts do not say which answer they are for, so they never count
                _check_verdict(row, f"{path}, verdict {number}")
                rows.setdefault(str(row["judge"][0]), []).append(row)
    return rows


def _check_verdict(row: Row, where: str) -> None:
    """Raise `UserError` for a verdict that lacks a field, or has one of another type."""
    wrong = [name for name, kinds in _FIELDS.items() if not isinstance(row.get(name), kinds)]
    if wrong or not row["judge"]:
        remedy = "delete the line, and `python -m experiments.mtbench judge` asks for it again"
        raise UserError(f"{where}: {', '.join(wrong or ['judge'])} is missing or of another type: {remedy}")


def _select_verdicts(rows: Iterable[Row], answers: Sequence[Answer]) -> list[Row]:
    """The last verdict for each turn of the answers that this model has now."""
    present = {(answer.model, answer.question_id, answer.answer_id) for answer in answers}
    last = {}
    for row in rows:
        if (row["model"], row["question_id"], row["answer_id"]) in present:
            last[row["question_id"], row["turn"]] = row
    return list(last.values())


def _score(model: str, judge: str | None, rows: Sequence[Row], answers: Sequence[Answer]) -> ModelScores:
    graded = [row for row in rows if row["score"] >= 1]  # -1 marks a verdict without a grade
    turns = sum(len(answer.turns) for answer in answers)
    newest = max(rows, key=lambda row: float(row["tstamp"]), default=None)
    return ModelScores(
        model=model,
        judge=judge,
        turn1=_mean(row for row in graded if row["turn"] == 1),
        turn2=_mean(row for row in graded if row["turn"] == 2),
        mean=_mean(graded),
        categories=_means_by("category", graded),
        judged=len(graded),
        unparsable=len(rows) - len(graded),
        unjudged=turns - len(rows),
        judge_model=None if newest is None else newest["judge_model"],
        date=None if newest is None else datetime.fromtimestamp(newest["tstamp"], UTC).date().isoformat(),
        questions=_means_by("question_id", graded),
    )


def _means_by(name: str, graded: Sequence[Row]) -> dict[str, float]:
    """Mean grade for each value of a field, in the order of the values."""
    values = sorted({str(row[name]) for row in graded})
    return {value: fmean(row["score"] for row in graded if str(row[name]) == value) for value in values}


def _mean(rows: Iterable[Row]) -> float | None:
    grades = [float(row["score"]) for row in rows]
    return fmean(grades) if grades else None


@dataclass(frozen=True)
class SideBySide:
    """One question and the answers to it: model -> one text per turn."""

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]


def side_by_side(
    answers: Path | str | Sequence[Path | str],
    question_ids: Sequence[QuestionId] | None = None,
    questions: Sequence[Question] | None = None,
) -> list[SideBySide]:
    """The answers of several models to chosen questions, in the order of the questions' file.

    Args:
        answers: a folder as for `compute_scores`, or answers files.
        question_ids: default: every question that some model answered.
        questions: default: MT-Bench's questions.

    Raises:
        UserError: for an unknown question, a missing or damaged file, or no answers at all.
    """
    by_model = _answers(answers)
    ids = {answer_id for found in by_model.values() for answer_id in found} if question_ids is None else question_ids
    chosen = select(load_questions() if questions is None else questions, map(str, ids))
    return [
        SideBySide(
            question.question_id,
            question.category,
            question.turns,
            {model: found[question.question_id] for model, found in by_model.items() if question.question_id in found},
        )
        for question in chosen
    ]


def _answers(places: Path | str | Sequence[Path | str]) -> dict[str, dict[QuestionId, tuple[str, ...]]]:
    if isinstance(places, Path | str):
        paths = sorted((Path(places) / "model_answer").glob("*.jsonl"))
    else:
        paths = [Path(place) for place in places]
    if not paths:
        raise UserError(f"no answers in {places}: create some with `python -m experiments.mtbench answer`")
    found = {path.stem: {answer.question_id: answer.turns for answer in load_answers(path)} for path in paths}
    if len(found) != len(paths):
        raise UserError("two answers files have the same name: each model needs its own")
    return found
