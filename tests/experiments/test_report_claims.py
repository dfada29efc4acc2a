"""The claims ledger and the evidence tables: verdicts follow from cells, and nothing is claimed without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases
from test_experiments_page import measurement
from test_experiments_report import cell, context

from experiments import published
from experiments.palette import STYLES, style_of
from experiments.report import command as report
from experiments.report import figures, page, score_hours
from experiments.report.decisions import CONTRADICTED, KINDS, NOT_TESTED, SUPPORTED, UNDECIDED, Decision, decide
from experiments.report.evidence import BLOCKS, load_evidence
from experiments.report.tables import ablation, claims, evidence
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


def test_no_difference_says_how_large_one_could_be(cases: Cases) -> None:
    cases.healthy(0.0)
    for task in ("sst2", "mrpc"):
        for number, seed in enumerate(SEEDS):
            cases.run("sparsegrad", task, seed, 0.80 + 0.01 * (1 - number))
    claim = {"decide": [PAIR]}
    one = Verdict(claim, decide(of(cases), PAIR), [])
    assert one.kind == UNDECIDED
    number = re.fullmatch(r"no difference larger than (\d+\.\d) points \(provisional: 3 of 5 seeds\)", one.text)
    assert number is not None
    (found,) = one.decisions
    assert float(number[1]) == pytest.approx(found.bound, abs=0.05)


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


@pytest.mark.parametrize(
    ("kinds", "verdict"),
    [
        ([SUPPORTED, NOT_TESTED], SUPPORTED),
        ([SUPPORTED, CONTRADICTED], CONTRADICTED),
        ([SUPPORTED, UNDECIDED], UNDECIDED),
        ([NOT_TESTED], NOT_TESTED),
    ],
)
def test_a_claim_says_all_of_its_parts(kinds: list[str], verdict: str) -> None:
    parts = [Decision(kind, "", bound=1.25, seeds=5) for kind in kinds]
    one = Verdict({}, parts, [])
    assert one.kind == verdict
    assert one.text == ("no difference larger than 1.2 points" if verdict == UNDECIDED else verdict)


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [({"at_least": 2.0}, SUPPORTED), ({"at_least": 4.0}, CONTRADICTED), ({"at_most": 3.0}, UNDECIDED)],
)
def test_a_ratio_needs_three_repeats_on_one_side(cases: Cases, limit: dict[str, float], verdict: str) -> None:
    setting = {"shape": "roberta_base", "batch": 16, "precision": "fp32", "mode": "eager", "rest": "trained"}
    setting |= {"padding": "max_length", "task": "cola", "label": "RoBERTa-base"}
    cells = []
    for repeat, ratio in enumerate((2.9, 3.0, 3.1)):
        cells += [{**measurement("s", "exact", 2.0 * ratio), "repeat": repeat}]
        cells += [{**measurement("s", "full", 2.0), "repeat": repeat}]
    document = {"schema": 1, "settings": {"s": setting}, "cells": cells, "hardware": {"device": "cpu"}}
    write_json(cases.results / "bench" / "box.json", document)
    spec = {"kind": "bench", "arm": "exact", "over": "full", "field": "steps_per_second", **limit}
    (found,) = decide(of(cases), spec)
    assert (found.verdict, found.place) == (verdict, "on a CPU")
    assert "3.00 times that of full (box, a CPU, 3 repeats)" in found.measured
    write_json(cases.results / "bench" / "box.json", {**document, "cells": cells[:4]})
    assert decide(of(cases), spec)[0].verdict == NOT_TESTED


def test_zeros_on_padding_contradict_strides(cases: Cases) -> None:
    def share(nonzero: float) -> dict[str, Any]:
        kinds = {kind: [nonzero, nonzero, 0.01] for kind in figures.KINDS}
        return {"model": "minilm", "shares": [{"pad": "max_length", "real_tokens": 0.5, "nonzero": kinds}]}

    spec = {"kind": "padding", "bound": 0.95, "see": ["figure3"]}
    assert decide(of(cases), spec)[0].verdict == NOT_TESTED
    for nonzero, verdict in ((0.5, CONTRADICTED), (0.1, SUPPORTED)):
        write_json(cases.results / "figures" / "figure3.json", share(nonzero))
        assert decide(of(cases), spec)[0].verdict == verdict


def test_an_unknown_kind_is_one_error(cases: Cases) -> None:
    with pytest.raises(UserError, match=r"kind=opinion .*difference"):
        decide(of(cases), {"kind": "opinion"})


def test_a_typed_verdict_is_refused(tmp_path: Path) -> None:
    claim = "- {id: 1, name: a, claim: b, section: c, published: d, logs: e, decide: [], verdict: supported}"
    (tmp_path / "claims.yaml").write_text(claim)
    with pytest.raises(UserError, match=r"claim 1 has wrong fields \(verdict\)"):
        read_claims(tmp_path)


def test_the_readme_gets_three_lines(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    cases.healthy()
    assert report.main(["claims", "--lines", "3", "--results-dir", str(cases.results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Holds", "Does not hold", "Open"]
    assert "SparseGrad beats LoRA" in lines[0], "one pair is tested, and holds"
    assert "not tested here: SparseGrad beats MeProp" in lines[2]
    assert report.main(["table1", "--lines", "3", "--results-dir", str(cases.results)]) == 2
    assert "--lines=3" in capsys.readouterr().err


def test_the_main_table_has_scores_differences_and_costs(cases: Cases) -> None:
    cases.healthy()
    main, tasks, *_ = evidence.tables(of(cases))
    row = {"method": "SparseGrad exact"}
    assert cell(main, "sst2", **row) == "86.00 ± 0.33 (3)"
    assert cell(main, "average", **row) == "86.00 ± 0.33 (3)"
    assert cell(main, "IQM", **row) == "86.00"
    assert cell(main, "minus LoRA, alpha = 2 rank", **row) == "+6.00"
    low, high = (float(part) for part in cell(main, "95 %", **row).split(" to "))
    assert 0 < low < 6 < high
    assert float(cell(main, "detectable", **row)) < 6
    assert (cell(main, "trials per search", **row), cell(main, "search h", **row)) == ("8", "1.00")
    assert cell(main, "training h", **row) == "0.17"  # 30 steps at 0.1 a second, two tasks
    assert cell(main, "h to target", **row) == "0.11"  # 20 of these steps
    assert cell(main, "h to target", method="LoRA, alpha = 2 rank") == "not reached on sst2, mrpc"
    assert cell(main, "minus LoRA, alpha = 2 rank", method="LoRA, alpha = 2 rank") == "reference"
    assert cell(tasks, "score", task="mrpc", **row) == "86.00 ± 0.33 (3)"
    assert cell(tasks, "learning rate", task="mrpc", **row) == "0.0001"
    assert len(main.records["SparseGrad exact sst2"]) == 3


def test_a_failed_gate_stands_in_place_of_differences(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        for task in ("sst2", "mrpc"):
            cases.run("full", task, seed, 0.5)
    main, tasks, *_ = evidence.tables(of(cases))
    said = "not comparable: full fine-tuning reached 50.00 of 60 on sst2"
    assert cell(main, "minus LoRA, alpha = 2 rank", method="SparseGrad exact") == said
    assert cell(main, "average", method="SparseGrad exact") == ""
    assert cell(tasks, "minus LoRA, alpha = 2 rank", method="SparseGrad exact", task="sst2") == said


def test_one_failed_task_leaves_the_others(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        cases.run("full", "sst2", seed, 0.5)
    main, *_ = evidence.tables(of(cases))
    assert cell(main, "minus LoRA, alpha = 2 rank", method="SparseGrad exact") == "+6.00"
    assert any("Average, differences and hours are over mrpc;" in note for note in main.notes)
    assert any(note.startswith("sst2: full fine-tuning 50.00, gate 60;") for note in main.notes)


def test_partial_and_empty_blocks_say_so(cases: Cases) -> None:
    cases.plan()
    tables = evidence.tables(of(cases))
    assert [table.name for table in tables] == list(BLOCKS)
    assert tables[0].frame.iloc[0, 0] == "not run yet (18 runs planned): make evidence BLOCK=2a DATA=<glue folder>"
    cases.run("full", "sst2", 42, 0.9)
    cases.run("sparsegrad", "mrpc", 42, 0.9)
    main, *_ = evidence.tables(of(cases))
    assert cell(main, "mrpc", method="full fine-tuning") == "missing"
    assert cell(main, "sst2", method="full fine-tuning") == "90.00 (1)"
    assert evidence.progress(of(cases))[0] == ("MiniLM", 2, 18)


def test_the_gates_have_no_comparison(cases: Cases) -> None:
    grid = {"task": "sst2", "seed": "42", "method": "full", "train.lr": "1e-4"}
    cases.plan("evidence_gates", {"min_seeds": 1, "seeds": [42]}, grid=grid)
    cases.run("full", "sst2", 42, 0.7, folder="evidence_gates")
    table = next(one for one in evidence.tables(of(cases)) if one.name == "evidence_gates")
    assert "95 %" not in table.frame.columns
    assert any(note.startswith("sst2: full fine-tuning 70.00, gate 60") for note in table.notes)


def test_failed_and_uncounted_runs_are_listed(cases: Cases) -> None:
    cases.healthy()
    path = cases.run("full", "sst2", 7, 0.9)
    record = {**json.loads(path.read_text()), "status": "failed", "reason": "the loss is not finite"}
    write_json(path, record)
    cases.run("full", "mrpc", 9, 0.9, plan=None)
    main, *_ = evidence.tables(of(cases))
    assert "Failed runs: full sst2: seed 7: the loss is not finite." in main.notes
    assert any("exploratory, made without a plan" in note for note in main.notes)


def test_the_front_holds_what_nothing_beats_in_score_and_hours(cases: Cases) -> None:
    cases.healthy()
    assert score_hours.points(of(cases), "evidence_mlp_only") == []
    found = {point.arm: point for point in score_hours.points(of(cases), "evidence_paper")}
    assert set(found) == {"full", "lora_tuned", "sparsegrad"}
    assert not found["lora_tuned"].reaches
    assert [point.arm for point in score_hours.front(list(found.values()))] == ["sparsegrad"]
    drawn = figures.draw(of(cases), "score_hours")
    assert [path.name for path in drawn.values()] == ["score_hours.png"]


def test_the_curve_of_kept_entries_comes_from_its_block(cases: Cases) -> None:
    assert ablation.evidence_curve(of(cases)) == []
    cases.healthy()
    grid = {"task": "sst2", "seed": "42,3705,2023", "method.keep": "5500,589824"}
    rules = {"gate_experiment": "evidence_paper", "regime": "mlp_only"}
    cases.plan("evidence_density", rules, grid=grid, method={"density": None})
    for keep, accuracy in ((5500, 0.7), (589824, 0.75)):
        for seed in SEEDS:
            name, options = f"{keep}-{seed}", {"density": None, "keep": keep}
            cases.run("sparsegrad", "sst2", seed, accuracy, folder="evidence_density", name=name, options=options)
    found = ablation.evidence_curve(of(cases))
    assert [(round(point.share, 2), round(point.value.mean)) for point in found] == [(0.93, 70), (100.0, 75)]


def test_every_method_has_its_own_colour_and_marker() -> None:
    looks = [(style.colour, style.marker) for style in STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert len({style.marker for style in STYLES.values()}) == len(STYLES), "markers alone tell methods apart"
    assert style_of("sparsegrad keep=5500").name == "SparseGrad exact, keep=5500"
    assert style_of("new_method").name == "new_method"


def test_the_page_opens_with_the_ledger_and_links_its_evidence(cases: Cases) -> None:
    cases.healthy()
    made = of(cases)
    tables = [claims.table(made), *evidence.tables(made)]
    text = page.write_page(made, tables, {}).read_text()
    assert text.index('id="claims"') < text.index('id="evidence_paper"') < text.index('id="environment"')
    assert '<a href="#evidence_paper">MiniLM</a>' in text
    assert 'href="#evidence_paper--sparsegrad-exact-sst2">86.00 ± 0.33 (3)</a>' in text
    assert (
        "make evidence BLOCK=2a DATA=&lt;glue folder&gt;" in text.split('id="evidence_paper--full-fine-tuning-sst2"')[1]
    )
    assert "<b>Evidence runs: 18 of 18 planned.</b>" in text
    assert text.count('class="scroll"') + text.count('class="scroll tall"') == text.count('tabindex="0" role="region"')
    targets = set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(re.findall(r'id="([^"]+)"', text)), "a link without its target"
    assert '<td class="num">86.00</td>' in text


def test_comparisons_are_made_once(cases: Cases) -> None:
    cases.healthy()
    made = of(cases)
    evidence.tables(made)
    known = len(load_evidence(made).compared)
    evidence.tables(made)
    decide(made, PAIR)
    assert len(load_evidence(made).compared) == known
