"""The judge's columns of Table 6: mean grade, judge and date."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from experiments.mtbench.scores import ModelScores

NOT_JUDGED = "not judged"
ALL_TURNS = 160  # MT-Bench's and I-Bench's 80 questions of two turns

Grades = Mapping[str, float]
"""Question's ID -> mean grade of its turns."""


def grade(graded: Sequence[ModelScores], model: str, method: str) -> dict[str, str]:
    """Columns `judge's score` and `judge` for the answers named MODEL-METHOD or MODEL-METHOD-SEED.

    Args:
        graded: scores from `experiments.mtbench`.
        model, method: names of the run.
    """
    judged = [one for one in _of_method(graded, model, method) if one.mean is not None]
    judges = sorted({str(one.judge) for one in judged})
    found = [[one for one in judged if one.judge == judge] for judge in judges]
    return {
        "judge's score": "; ".join(f"{fmean(one.mean for one in of if one.mean is not None):.2f}" for of in found),
        "judge": "; ".join(map(_describe_judge, found)) or NOT_JUDGED,
    }


def complete_grades(graded: Sequence[ModelScores], model: str, methods: Sequence[str]) -> dict[str, list[Grades]]:
    """Judge -> grades of each method, for the judges that graded all 160 turns of every answers file of each.

    Grades of different judges or of different questions cannot be compared.
    """
    found = [_complete_grades(_of_method(graded, model, method)) for method in methods]
    common = sorted(set[str].intersection(*map(set, found)))
    by_judge = {judge: [grades[judge] for grades in found] for judge in common}
    return {judge: grades for judge, grades in by_judge.items() if _are_of_same_questions(grades)}


def count_answers(graded: Sequence[ModelScores], model: str, method: str) -> int:
    """Number of answers files of a method, one for each seed."""
    return len({one.model for one in _of_method(graded, model, method)})


def _complete_grades(of: Sequence[ModelScores]) -> dict[str, Grades]:
    """Judge -> grades averaged over the answers files of a method, for the judges that graded each completely."""
    whole: dict[str, dict[str, Grades]] = {}
    for one in of:
        if one.judge is not None and (one.judged, one.unparsable, one.unjudged) == (ALL_TURNS, 0, 0):
            whole.setdefault(one.judge, {})[one.model] = one.questions
    files = {one.model for one in of}
    complete = {judge: list(found.values()) for judge, found in whole.items() if set(found) == files}
    return {judge: _average(grades) for judge, grades in complete.items() if _are_of_same_questions(grades)}


def _are_of_same_questions(grades: Sequence[Grades]) -> bool:
    return all(one.keys() == grades[0].keys() for one in grades)


def _average(files: Sequence[Grades]) -> Grades:
    return {question: fmean(grades[question] for grades in files) for question in files[0]}


def _of_method(graded: Sequence[ModelScores], model: str, method: str) -> list[ModelScores]:
    """The scores of the answers named MODEL-METHOD or MODEL-METHOD-SEED."""
    name = re.compile(rf"{re.escape(model)}-{re.escape(method)}(-\d+)?")
    return [one for one in graded if name.fullmatch(one.model)]


def _describe_judge(of: Sequence[ModelScores]) -> str:
    """Judge, day of the last verdict, and number of graded turns."""
    turns, graded = sum(one.judged + one.unparsable + one.unjudged for one in of), sum(one.judged for one in of)
    return f"{of[0].judge}, {max(str(one.date) for one in of)}, {graded} of {turns} turns"
