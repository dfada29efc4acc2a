"""The evidence tables, their figures and the page: scores, differences and costs, and nothing without runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from evidence_cases import SEEDS, Cases
from test_experiments_report import cell
from test_report_claims import PAIR, of

from experiments.palette import STYLES, style_of
from experiments.report import figures, page, score_hours
from experiments.report.blocks import BLOCKS, block_command
from experiments.report.collect import commit_of
from experiments.report.decisions import decide
from experiments.report.evidence import load_evidence
from experiments.report.searches import machine_of
from experiments.report.tables import ablation, claims, main_tables
from sparsegrad.files import write_json


def test_the_main_table_has_scores_differences_and_costs(cases: Cases) -> None:
    cases.healthy()
    main, tasks, *_ = main_tables.tables(of(cases))
    row = {"method": "SparseGrad exact"}
    assert cell(main, "sst2", **row) == "86.00 ± 0.33 (3)"
    assert cell(main, "average", **row) == "86.00 ± 0.33 (3)"
    assert cell(main, "IQM", **row) == "86.00"
    assert cell(main, "minus LoRA, alpha = 2 rank", **row) == "+6.00"
    low, high = (float(part) for part in cell(main, "95 %", **row).split(" to "))
    assert 0 < low < 6 < high
    widest = [float(part) for part in cell(main, "95 % jointly", **row).split(" to ")]
    assert widest[0] < low < high < widest[1], "for two comparisons"
    assert float(cell(main, "detectable", **row)) < 6
    assert (cell(main, "trials per search", **row), cell(main, "search h", **row)) == ("8", "1.00")
    assert cell(main, "training h", **row) == "0.17"  # 30 steps at 0.1 a second, two tasks
    assert cell(main, "h to target", **row) == "0.11"  # 20 of these steps
    missed = "not reached by 3 of 3 seeds (sst2), 3 of 3 seeds (mrpc)"
    assert cell(main, "h to target", method="LoRA, alpha = 2 rank") == missed
    assert cell(main, "minus LoRA, alpha = 2 rank", method="LoRA, alpha = 2 rank") == "reference"
    assert cell(tasks, "score", task="mrpc", **row) == "86.00 ± 0.33 (3)"
    assert cell(tasks, "learning rate", task="mrpc", **row) == "0.0001"
    assert len(main.records["SparseGrad exact sst2"]) == 3


def test_a_table_names_the_commits_of_its_runs(cases: Cases) -> None:
    cases.healthy()
    notes = "\n".join(main_tables.tables(of(cases))[0].notes)
    assert "Code of the runs" not in notes, "no record says"
    for seed, commit, dirty in zip(SEEDS, ("a" * 40, "b" * 40, "b" * 40), (False, True, True), strict=True):
        about = {"finished": f"2026-01-0{2 + dirty}T00:00:00+00:00", "git": {"commit": commit, "dirty": dirty}}
        cases.run("full", "sst2", seed, 0.85, environment=about)
    for table in main_tables.tables(of(cases))[:2]:
        assert "Code of the runs, as commit (runs): unknown (15), aaaaaaa (1), bbbbbbb with changes (2)." in table.notes


def test_a_continued_run_has_the_commits_and_the_machines_of_all_its_processes() -> None:
    git = [{"commit": letter * 40, "dirty": letter == "b"} for letter in "abc"]
    processes: list[dict[str, Any]] = [{"git": git[0], "hardware": {"device": "cpu", "cpu": "Xeon"}}, {"git": git[1]}]
    last = {"git": git[2], "hardware": {"device": "cpu", "cpu": "EPYC"}}
    record = {"environment": {**last, "continued_from": processes}}
    assert commit_of(record) == "aaaaaaa then bbbbbbb then ccccccc with changes"
    assert machine_of(record) == "Xeon and EPYC"
    record = {"environment": {**last, "continued_from": [{**last, "hardware": {}}]}}
    assert (commit_of(record), machine_of(record)) == ("ccccccc", "EPYC")


def test_a_table_names_the_machines_of_its_runs_and_of_their_searches(cases: Cases) -> None:
    cases.healthy()
    gpu = {"hardware": {"device": "cuda", "cpu": "Xeon", "gpu": "H200"}}
    cpu = {"hardware": {"device": "cpu", "cpu": "EPYC", "gpu": "idle"}}
    cases.run("full", "sst2", SEEDS[0], 0.85, environment=cpu)
    for name, about in (("1", cpu), ("2", gpu), ("3", gpu)):
        trials = "evidence-minilm-full-sst2"
        cases.run("full", "sst2", 7, 0.85, folder=trials, experiment="evidence_paper", name=name, environment=about)
    main, tasks, *_ = main_tables.tables(of(cases))
    assert "Machines of the runs (runs): unknown (17), EPYC (1)." in tasks.notes
    assert "Machines of the runs (runs): unknown (17), EPYC (1)." in main.notes
    assert "Machines of their searches (searches): unknown (5), EPYC and H200 (1)." in main.notes


def test_a_run_without_a_speed_has_reached_the_target_at_an_unknown_time(cases: Cases) -> None:
    cases.healthy()
    cases.run("sparsegrad", "sst2", SEEDS[0], 0.86, speed={"steps_per_second": None})
    main, *_ = main_tables.tables(of(cases))
    assert cell(main, "h to target", method="SparseGrad exact") == "unknown on sst2"
    assert "sparsegrad" not in {point.arm for point in score_hours.points(of(cases), "evidence_paper")}


def test_a_failed_gate_stands_in_place_of_differences(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        for task in ("sst2", "mrpc"):
            cases.run("full", task, seed, 0.5)
    main, tasks, *_ = main_tables.tables(of(cases))
    said = "not comparable: full fine-tuning reached 50.00 of 60 on sst2"
    assert cell(main, "minus LoRA, alpha = 2 rank", method="SparseGrad exact") == said
    assert cell(main, "average", method="SparseGrad exact") == ""
    assert cell(tasks, "minus LoRA, alpha = 2 rank", method="SparseGrad exact", task="sst2") == said


def test_one_failed_task_leaves_the_others(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        cases.run("full", "sst2", seed, 0.5)
    main, *_ = main_tables.tables(of(cases))
    assert cell(main, "minus LoRA, alpha = 2 rank", method="SparseGrad exact") == "+6.00"
    assert any("Average, differences and hours are over mrpc;" in note for note in main.notes)
    assert any(note.startswith("sst2: full fine-tuning 50.00, gate 60;") for note in main.notes)


def test_partial_and_empty_blocks_say_so(cases: Cases) -> None:
    cases.plan()
    tables = main_tables.tables(of(cases))
    assert [table.name for table in tables] == list(BLOCKS)
    assert tables[0].frame.iloc[0, 0] == "not run yet (18 runs planned): make evidence BLOCK=2 DATA=<glue folder>"
    cases.run("full", "sst2", 42, 0.9)
    cases.run("sparsegrad", "mrpc", 42, 0.9)
    main, *_ = main_tables.tables(of(cases))
    assert cell(main, "mrpc", method="full fine-tuning") == "missing"
    assert cell(main, "sst2", method="full fine-tuning") == "90.00 (1)"
    assert main_tables.progress(of(cases))[0] == ("MiniLM", 2, 18)


@pytest.mark.parametrize(
    ("folder", "seeds", "ending"),
    [
        ("evidence_paper", (), "BLOCK=2 DATA=<glue folder>"),
        ("evidence_paper", (2023, 42), "BLOCK=2a DATA=<glue folder>"),
        ("evidence_paper", (37,), "BLOCK=2b DATA=<glue folder>"),
        ("evidence_paper", (42, 37), "BLOCK=2 DATA=<glue folder>"),
        ("evidence_basis", (42,), "BLOCK=4 DATA=<glue folder>"),
        ("evidence_smollm2", (), "BLOCK=6 TREES=<file of trees>"),
    ],
)
def test_a_block_names_the_command_that_makes_its_runs(folder: str, seeds: tuple[int, ...], ending: str) -> None:
    assert block_command(folder, seeds) == f"make evidence {ending}"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("evidence_paper_tasks", "make evidence BLOCK=2 DATA"),
        ("compare", "make compare SCALE=mini DATA"),
        ("compare_smollm2", "make compare SCALE=mini TASKS=oasst1"),
        ("quality_energy", "make reproduce-quality"),
        ("table9", "make reproduce-table9"),
        ("claims", "make report"),
    ],
)
def test_the_page_names_the_command_that_makes_the_runs_of_a_table(table: str, said: str) -> None:
    assert page._command(table).startswith(said)


def test_the_gates_have_no_comparison(cases: Cases) -> None:
    grid = {"task": "sst2", "seed": "42", "method": "full", "train.lr": "1e-4"}
    cases.plan("evidence_gates", {"min_seeds": 1, "seeds": [42]}, grid=grid)
    cases.run("full", "sst2", 42, 0.7, folder="evidence_gates")
    table = next(one for one in main_tables.tables(of(cases)) if one.name == "evidence_gates")
    assert "95 %" not in table.frame.columns
    assert any(note.startswith("sst2: full fine-tuning 70.00, gate 60") for note in table.notes)


def test_failed_and_uncounted_runs_are_listed(cases: Cases) -> None:
    cases.healthy()
    path = cases.run("full", "sst2", 7, 0.9)
    record = {**json.loads(path.read_text()), "status": "failed", "reason": "the loss is not finite"}
    write_json(path, record)
    cases.run("full", "mrpc", 9, 0.9, plan=None)
    main, *_ = main_tables.tables(of(cases))
    assert any(note.startswith("Failed runs: full sst2: seed 7: exploratory, ") for note in main.notes)
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
    tables = [claims.table(made), *main_tables.tables(made)]
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
    main_tables.tables(made)
    known = len(load_evidence(made).compared)
    main_tables.tables(made)
    decide(made, PAIR)
    assert len(load_evidence(made).compared) == known
