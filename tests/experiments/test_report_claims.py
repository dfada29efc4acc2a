"""The claims ledger: verdicts follow from cells, and nothing is claimed without them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from evidence_cases import SEEDS, Cases
from test_experiments_page import measurement
from test_experiments_report import context

from experiments import published
from experiments.bench.presets import paper_setting
from experiments.mtbench.scores import ModelScores
from experiments.report import command as report
from experiments.report import decisions, figures
from experiments.report.bench_ratios import _describe_larger
from experiments.report.blocks import BLOCKS
from experiments.report.decisions import CONTRADICTED, KINDS, NOT_TESTED, SUPPORTED, UNDECIDED, decide
from experiments.report.tables import claims
from experiments.report.tables.base import Context
from experiments.report.tables.claims import Verdict, read_claims
from sparsegrad.errors import UserError
from sparsegrad.files import write_json

PAIR = {"kind": "difference", "a": "sparsegrad", "b": "lora_tuned", "expect": "higher", "blocks": ["evidence_paper"]}


def of(cases: Cases) -> Context:
    return context(cases.results)


def test_every_claim_names_cells_and_blocks_that_exist() -> None:
    found = read_claims()
    assert {int(re.sub(r"\D", "", str(one["id"]))) for one in found if str(one["id"])[0] != "P"} == set(range(1, 14))
    for claim in found:
        for one in claim.get("cells", []):
            assert (one["row"], one["column"]) in published.cells(one["table"]), claim["id"]
        for spec in claim["decide"]:
            assert spec["kind"] in KINDS
            assert set(spec.get("blocks", [])) <= set(BLOCKS)
            assert spec.get("expect", "higher") in ("higher", "lower")


def test_logged_speeds_are_of_the_tasks_that_all_methods_have(cases: Cases) -> None:
    """Tasks differ in steps/s by more than methods do, so means over different tasks compare nothing."""
    logged = claims.table(of(cases)).frame.set_index("#").loc["9", "authors' logs"]
    assert logged.endswith("full 3.75 steps/s, lora 3.96 steps/s (batch size 32; cola, mrpc, sst2)")


@pytest.mark.parametrize(
    ("gain", "expect", "verdict"),
    [(0.06, "higher", SUPPORTED), (0.06, "lower", CONTRADICTED), (-0.06, "higher", CONTRADICTED)],
)
def test_a_difference_is_decided_by_its_interval(cases: Cases, gain: float, expect: str, verdict: str) -> None:
    cases.healthy(gain)
    (found,) = decide(of(cases), {**PAIR, "expect": expect})
    assert (found.verdict, found.seeds, found.see) == (verdict, 3, ("evidence_paper",))
    assert f"SparseGrad exact minus LoRA, alpha = 2 rank {100 * gain:+.2f}" in found.measured
    assert "sst2, mrpc, 3 seeds" in found.measured


def test_an_undecided_claim_shows_its_interval(cases: Cases) -> None:
    cases.healthy(0.0)
    for task in ("sst2", "mrpc"):
        for number, seed in enumerate(SEEDS):
            cases.run("sparsegrad", task, seed, 0.80 + 0.01 * (1 - number))
    claim = {"decide": [PAIR]}
    one = Verdict(claim, decide(of(cases), PAIR), [])
    assert one.kind == UNDECIDED
    (found,) = one.decisions
    assert found.interval is not None
    low, high = found.interval
    said = f"undecided: the interval is {low:+.2f} to {high:+.2f} points on SST-2, MRPC (provisional: 3 of 5 seeds)"
    assert one.text == said
    assert low < 0 < high


def test_a_margin_is_kept_or_broken(cases: Cases) -> None:
    cases.healthy(0.0)
    margin = {**PAIR, "kind": "margin"}
    assert [decide(of(cases), {**margin, "bound": bound})[0].verdict for bound in (5.0, 0.01)] == [SUPPORTED, UNDECIDED]
    cases.healthy(-0.06)
    assert decide(of(cases), {**margin, "bound": 1.0})[0].verdict == CONTRADICTED


def test_a_failed_gate_and_missing_runs_are_not_tested(cases: Cases) -> None:
    cases.plan()
    (found,) = decide(of(cases), PAIR)
    assert (found.verdict, found.measured) == (NOT_TESTED, "MiniLM: not run yet")
    cases.healthy()
    for seed in SEEDS:
        for task in ("sst2", "mrpc"):
            cases.run("full", task, seed, 0.5)
    (found,) = decide(of(cases), PAIR)
    assert found.verdict == NOT_TESTED
    assert "not comparable: full fine-tuning reached 50.00 of 60 on sst2" in found.measured


def test_two_paired_seeds_decide_nothing(cases: Cases) -> None:
    cases.healthy()
    for task in ("sst2", "mrpc"):
        (cases.results / "runs" / "evidence_paper" / f"sparsegrad-{task}-42.json").unlink()
    (found,) = decide(of(cases), PAIR)
    assert found.verdict == NOT_TESTED
    assert "fewer than 3 paired seeds" in found.measured


def test_each_of_many_parts_must_refute_a_claim_more_clearly_but_not_support_it(cases: Cases) -> None:
    cases.healthy(0.02)
    found = [decide(of(cases), {**PAIR, "expect": expect}, 10**9)[0] for expect in ("higher", "lower")]
    assert [one.verdict for one in found] == [SUPPORTED, UNDECIDED]
    alone, joint = (one.interval for one in found)
    assert joint[0] < 0 < alone[0], "an undecided part shows the interval that leaves it open"
    assert "the interval, widened for 1000000000 parts, is -" in Verdict({}, found[1:], []).text


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [({"at_least": 2.0}, SUPPORTED), ({"at_least": 4.0}, CONTRADICTED), ({"at_most": 3.0}, UNDECIDED)],
)
def test_a_ratio_needs_three_repeats_on_one_side(cases: Cases, limit: dict[str, float], verdict: str) -> None:
    setting = paper_setting().as_json()
    cells = []
    for repeat, ratio in enumerate((2.9, 3.0, 3.1)):
        cells += [{**measurement("s", "exact", 2.0 * ratio), "repeat": repeat}]
        cells += [{**measurement("s", "full", 2.0), "repeat": repeat}]
    document = {"schema": 1, "settings": {"s": setting}, "cells": cells, "hardware": {"device": "cpu"}}
    write_json(cases.results / "bench" / "box.json", document)
    spec = {"kind": "bench", "arm": "exact", "over": "full", "field": "steps_per_second", **limit}
    (found,) = decide(of(cases), spec)
    assert (found.verdict, found.place, found.see) == (verdict, "on a CPU", ("table3_measured",))
    assert "3.00 times that of full (box, a CPU, 3 repeats)" in found.measured
    shorter = [{**cell, "steps": 3} if cell["repeat"] == 2 and cell["arm"] == "full" else cell for cell in cells]
    write_json(cases.results / "bench" / "box.json", {**document, "cells": shorter})
    assert decide(of(cases), spec)[0].verdict == NOT_TESTED, "cells of different length are not compared"
    write_json(cases.results / "bench" / "box.json", {**document, "cells": cells[:4]})
    assert decide(of(cases), spec)[0].verdict == NOT_TESTED


GRADE = {"kind": "grade", "a": "sparsegrad", "b": "lora", "model": "llama2_7b", "see": ["table6"]}


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([("sparsegrad-1", "j", 6.6, 160), ("sparsegrad-2", "j", 7.0, 160), ("lora", "j", 6.4, 160)], SUPPORTED),
        ([("sparsegrad", "j", 6.0, 160), ("lora", "j", 6.4, 160)], CONTRADICTED),
        ([("sparsegrad", "j", 6.5, 160), ("lora", "j", 6.4, 160)], UNDECIDED),  # inside the interval over questions
        ([("sparsegrad", "j", 6.4, 160), ("lora", "j", 6.4, 160)], UNDECIDED),
        ([("sparsegrad", "j", 9.0, 160), ("lora", "k", 2.0, 160)], NOT_TESTED),  # of two judges
        ([("sparsegrad", "j", 9.0, 159), ("lora", "j", 2.0, 160)], NOT_TESTED),
        ([("sparsegrad", "j", 9.0, 3), ("lora", "j", 2.0, 3)], NOT_TESTED),
        ([("sparsegrad-1", "j", 9.0, 160), ("sparsegrad-2", None, None, 0), ("lora", "j", 2.0, 160)], NOT_TESTED),
        # `a` comes first, but only `z` graded both.
        ([("sparsegrad", "a", 1.0, 160), ("sparsegrad", "z", 7.0, 160), ("lora", "z", 6.0, 160)], SUPPORTED),
        ([(arm, judge, grade, 160) for arm, judge, grade in zip(
            ("sparsegrad", "lora") * 2, "jjkk", (7.0, 6.0, 5.0, 6.0), strict=True
        )], UNDECIDED),
    ],
)  # fmt: skip
def test_grades_decide_if_a_judge_gave_all_of_both_arms(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, scores: list[tuple[str, str | None, float | None, int]], verdict: str
) -> None:
    monkeypatch.setattr(decisions, "compute_scores", lambda folder: [graded(*one) for one in scores])
    assert decide(of(cases), GRADE)[0].verdict == verdict


def graded(arm: str, judge: str | None, mean: float | None, judged: int) -> ModelScores:
    """Scores whose 80 questions vary around `mean`, in each file in another way: a standard deviation of 0.7."""
    draws = np.random.default_rng(sum(map(ord, arm))).normal(scale=0.7, size=80)
    grades = dict(zip(map(str, range(80)), draws - draws.mean() + (mean or 0.0), strict=True))
    return ModelScores(
        model=f"llama2_7b-{arm}", judge=judge, turn1=None, turn2=None, mean=mean, categories={}, judged=judged,
        unparsable=0, unjudged=max(0, 160 - judged) if judged > 3 else 0, date="2026-01-02", questions=grades,
    )  # fmt: skip


def test_grades_of_different_questions_are_not_compared(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    other = graded("lora", "j", 2.0, 160)
    other = replace(other, questions={f"i{question}": grade for question, grade in other.questions.items()})
    monkeypatch.setattr(decisions, "compute_scores", lambda folder: [graded("sparsegrad", "j", 9.0, 160), other])
    assert decide(of(cases), GRADE)[0].verdict == NOT_TESTED


def test_an_undecided_grade_shows_its_interval(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [graded("sparsegrad", "j", 6.5, 160), graded("lora", "j", 6.4, 160)]
    monkeypatch.setattr(decisions, "compute_scores", lambda folder: scores)
    (found,) = decide(of(cases), GRADE)
    gains = [scores[0].questions[one] - scores[1].questions[one] for one in scores[0].questions]
    interval = scipy.stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    said = f"undecided: the interval is {interval.low:+.2f} to {interval.high:+.2f} in grade"
    assert Verdict({}, [found], []).text.startswith(said)


def test_rows_of_zeros_are_supported_and_their_share_of_padding_is_shown(cases: Cases) -> None:
    def share(nonzero: float) -> dict[str, Any]:
        kinds = {kind: [nonzero, nonzero, 0.1] for kind in figures.KINDS}
        return {"model": "minilm", "shares": [{"pad": "max_length", "real_tokens": 0.5, "nonzero": kinds}]}

    spec = {"kind": "zeros", "at_least": 0.5, "see": ["figure3"]}
    assert decide(of(cases), spec)[0].verdict == NOT_TESTED
    for nonzero, verdict, said in ((0.4, SUPPORTED, "70 % of dL/dY"), (0.9, CONTRADICTED, "37 % of dL/dY")):
        write_json(cases.results / "figures" / "figure3.json", share(nonzero))
        found = decide(of(cases), spec)[0]
        assert found.verdict == verdict
        assert said in found.measured
    write_json(cases.results / "figures" / "figure3.json", share(0.375))
    assert "80.0 % of the zeros are on padding tokens" in decide(of(cases), spec)[0].measured, "0.5 of 0.625"


def test_an_unknown_kind_is_one_error(cases: Cases) -> None:
    with pytest.raises(UserError, match=r"kind=opinion .*difference"):
        decide(of(cases), {"kind": "opinion"})


def test_a_typed_verdict_is_refused(tmp_path: Path) -> None:
    claim = "- {id: 1, name: a, claim: b, section: c, published: d, logs: e, decide: [], verdict: supported}"
    (tmp_path / "claims.yaml").write_text(claim)
    with pytest.raises(UserError, match=r"claim 1 has wrong fields \(verdict\)"):
        read_claims(tmp_path)


def test_the_readme_gets_three_lines(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    cases.healthy(0.15)
    assert report.main(["claims", "--lines", "3", "--results-dir", str(cases.results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Holds", "Does not hold", "Open"]
    assert "SparseGrad beats full fine-tuning" in lines[0], "its tested part holds"
    assert "SparseGrad beats MeProp" in lines[2]
    assert report.main(["table1", "--lines", "3", "--results-dir", str(cases.results)]) == 2
    assert "--lines=3" in capsys.readouterr().err


def test_a_claim_about_an_average_says_that_it_rests_on_one_task(cases: Cases) -> None:
    cases.healthy(0.06)
    for seed in SEEDS:
        (cases.results / "runs" / "evidence_paper" / f"sparsegrad-mrpc-{seed}.json").unlink()
    one = Verdict({"name": "it is better"}, decide(of(cases), PAIR), [])
    assert one.text == "supported on SST-2 alone (provisional: 3 of 5 seeds)"


def test_a_larger_model_with_fewer_repeats_stands_beside_the_one_that_decides() -> None:
    whole = {(True, 12): [0.5, 0.7]}
    assert _describe_larger((False, 1), whole, {(True, 12): 0}) == "; the whole model: 0.60 in 2 repeats"
    assert _describe_larger((False, 1), whole, {(True, 12): 1}).endswith("by different commits in 1 of them")
    assert _describe_larger((False, 2), {(False, 1): [0.5]}, {}) == ""
    assert _describe_larger((True, 12), {}, {}) == ""
