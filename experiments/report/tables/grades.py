"""The judge's columns of Table 6: mean grade, judge and date."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from experiments.mtbench.scores import ModelScores

NOT_JUDGED = "not judged"


def grade(graded: Sequence[ModelScores], model: str, method: str) -> dict[str, str]:
    """Columns `judge's score` and `judge` for the answers named MODEL-METHOD or MODEL-METHOD-SEED.

    Args:
        graded: scores from `experiments.mtbench`.
        model, method: names of the run.
    """
    name = re.compile(rf"{re.escape(model)}-{re.escape(method)}(-\d+)?")
    judged = [one for one in graded if name.fullmatch(one.model) and one.mean is not None]
    judges = sorted({str(one.judge) for one in judged})
    found = [[one for one in judged if one.judge == judge] for judge in judges]
    return {
        "judge's score": "; ".join(f"{fmean(one.mean for one in of if one.mean is not None):.2f}" for of in found),
        "judge": "; ".join(map(_describe_judge, found)) or NOT_JUDGED,
    }


def _describe_judge(of: Sequence[ModelScores]) -> str:
    """Judge, day of the last verdict, and number of graded turns."""
    turns, graded = sum(one.judged + one.unparsable + one.unjudged for one in of), sum(one.judged for one in of)
    return f"{of[0].judge}, {max(str(one.date) for one in of)}, {graded} of {turns} turns"
