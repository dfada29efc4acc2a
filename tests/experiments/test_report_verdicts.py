"""What a verdict on a claim says: its kind, and the tasks, places and seeds of the parts that it rests on."""

from __future__ import annotations

from typing import Any

import pytest
from evidence_cases import Cases
from test_report_claims import graded, of

from experiments.report import decisions
from experiments.report.decisions import CONTRADICTED, NOT_TESTED, SUPPORTED, UNDECIDED, Decision
from experiments.report.tables import claims
from experiments.report.tables.claims import Verdict, lines, read_claims

FOUR = ("stsb", "mrpc", "sst2", "cola")


@pytest.mark.parametrize(
    ("kinds", "verdict", "text"),
    [
        ([SUPPORTED, SUPPORTED], SUPPORTED, "supported"),
        ([SUPPORTED, NOT_TESTED], SUPPORTED, "supported in 1 of 2 parts, the others are not tested"),
        ([SUPPORTED, CONTRADICTED], CONTRADICTED, "contradicted"),
        (
            [SUPPORTED, UNDECIDED],
            UNDECIDED,
            "supported in 1 of 2 parts; in others undecided: the interval is -1.21 to +0.30 points",
        ),
        ([UNDECIDED, NOT_TESTED], UNDECIDED, "undecided: the interval is -1.21 to +0.30 points"),
        ([NOT_TESTED], NOT_TESTED, "not tested here"),
    ],
)
def test_a_claim_says_all_of_its_parts(kinds: list[str], verdict: str, text: str) -> None:
    parts = [Decision(kind, "", (-1.21, 0.30) if kind == UNDECIDED else None, seeds=5) for kind in kinds]
    one = Verdict({}, parts, [])
    assert one.kind == verdict
    assert one.text == text


def test_of_several_undecided_parts_the_widest_interval_is_shown() -> None:
    parts = [Decision(UNDECIDED, "", interval, unit="in loss") for interval in ((-0.1, 0.2), (-0.3, 0.1))]
    assert Verdict({}, parts, []).text == "undecided: the widest interval is -0.300 to +0.100 in loss"


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (["on a CPU", "on a CPU"], "not reproduced on a CPU"),
        (["on a CPU", ""], "contradicted on a CPU"),
        (["", ""], "contradicted"),
    ],
)
def test_a_cpu_alone_refutes_no_measurement_on_a_gpu(cases: Cases, places: list[str], text: str) -> None:
    found, parts = of(cases), [Decision(CONTRADICTED, "", place=place) for place in places]
    one = Verdict({"name": "it is faster"}, parts, [])
    assert one.text == text
    found.store.cache["claims"] = [one]
    said = "nothing yet | not reproduced: it is faster (on a CPU)" if all(places) else "it is faster"
    assert lines(found)[1].startswith(f"Does not hold: {said}")


def test_a_part_without_an_interval_says_what_speaks_for_it_and_what_against() -> None:
    parts = [Decision(UNDECIDED, "", mixed="peak memory 0.78 to 0.82 times, on both sides of 0.8")]
    assert Verdict({}, parts, []).text == "undecided (peak memory 0.78 to 0.82 times, on both sides of 0.8)"


def test_the_limits_of_a_verdict_are_in_the_lines(cases: Cases) -> None:
    found = of(cases)
    parts = [Decision(SUPPORTED, "", seeds=3, place="on a CPU"), Decision(NOT_TESTED, "")]
    found.store.cache["claims"] = [Verdict({"name": "it is better"}, parts, [])]
    limits = "in 1 of 2 parts, the others are not tested on a CPU (provisional: 3 of 5 seeds)"
    assert lines(found)[0] == f"Holds: nothing yet | reproduced: it is better ({limits})."


@pytest.mark.parametrize(
    ("parts", "text", "tasks"),
    [
        (
            [
                Decision(SUPPORTED, "", (0.2, 1.5), seeds=5, tasks=FOUR),
                Decision(UNDECIDED, "", (-3, 5), seeds=3, tasks=("cola",)),
            ],
            "supported in 1 of 2 parts on STS-B, MRPC, SST-2, CoLA; in others undecided: the interval is -3.00 to "
            "+5.00 points on CoLA alone (provisional: 3 of 5 seeds)",
            "on CoLA alone",
        ),
        (
            [
                Decision(UNDECIDED, "", (-0.3, 1.5), seeds=3, tasks=FOUR),
                Decision(CONTRADICTED, "", (-3, -1), seeds=5, tasks=("cola",)),
            ],
            "contradicted on CoLA alone",
            "on CoLA alone",
        ),
        (
            [
                Decision(UNDECIDED, "", (-0.3, 1.5), seeds=3, tasks=("cola",)),
                Decision(UNDECIDED, "", (-3, 1), seeds=5, tasks=FOUR),
            ],
            "undecided: the widest interval is -3.00 to +1.00 points on STS-B, MRPC, SST-2, CoLA",
            "on STS-B, MRPC, SST-2, CoLA",
        ),
        (
            [Decision(SUPPORTED, "", place="on a CPU"), Decision(CONTRADICTED, "", (-3, -1), seeds=5, tasks=("cola",))],
            "contradicted on CoLA alone",
            "on CoLA alone",
        ),
        (
            [Decision(SUPPORTED, "", seeds=3), Decision(UNDECIDED, "", (-1, 1), seeds=3)],
            "supported in 1 of 2 parts; in others undecided: the interval is -1.00 to +1.00 points "
            "(provisional: 3 of 5 seeds)",
            "",
        ),
    ],
    ids=["supported and open", "refuted", "two open", "refuted elsewhere", "the same limits"],
)
def test_tasks_places_and_seeds_are_of_the_parts_that_decide(parts: list[Decision], text: str, tasks: str) -> None:
    one = Verdict({}, parts, [])
    assert (one.text, one.tasks) == (text, tasks)


def grade_claims() -> list[dict[str, Any]]:
    found = [one for one in read_claims() if sum(spec["kind"] == "grade" for spec in one["decide"]) > 1]
    assert found
    return found


@pytest.mark.parametrize("claim", grade_claims(), ids=lambda claim: str(claim["id"]))
@pytest.mark.parametrize(
    ("best", "kind"), [(7.0, SUPPORTED), (5.0, CONTRADICTED), (6.4, UNDECIDED)], ids=["best", "worst", "like others"]
)
def test_a_claim_of_several_grades_has_a_verdict(
    claim: dict[str, Any], best: float, kind: str, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graded pair is one of the differences that the intervals of a refutation are corrected for."""
    arms = {str(spec[side]) for spec in claim["decide"] for side in ("a", "b")}
    own = str(claim["decide"][0]["a"])
    scores = [graded(arm, "j", best if arm == own else 6.4, 160) for arm in sorted(arms)]
    monkeypatch.setattr(decisions, "compute_scores", lambda folder: scores)
    found = claims._judge_claim(of(cases), claim)
    assert found.kind == kind
    assert sum(map(decisions.count_differences, claim["decide"])) == len(claim["decide"])


def test_a_grade_that_is_refuted_alone_but_not_with_the_others_shows_the_interval_that_says_so(
    cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [graded("sparsegrad", "j", 6.15, 160), graded("lora", "j", 6.4, 160)]
    monkeypatch.setattr(decisions, "compute_scores", lambda folder: scores)
    spec = {"kind": "grade", "a": "sparsegrad", "b": "lora", "model": "llama2_7b", "see": ["table6"]}
    (alone,), (joint,) = (decisions.decide(of(cases), spec, parts) for parts in (1, 10**6))
    assert (alone.verdict, joint.verdict) == (CONTRADICTED, UNDECIDED)
    assert alone.interval is not None
    assert joint.interval is not None
    assert alone.interval[1] < 0 < joint.interval[1]
    assert "the interval, widened for 1000000 parts, is -" in Verdict({}, [joint], []).text
