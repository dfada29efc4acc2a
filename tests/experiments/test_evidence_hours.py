"""Hours of the evidence tables: at one speed for all methods, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
from evidence_cases import SEEDS, Cases
from test_experiments_report import cell
from test_report_claims import of

from experiments.report import clock, score_hours
from experiments.report.evidence import load_evidence
from experiments.report.searches import Searches
from experiments.report.tables import main_tables
from experiments.report.tables.costs import Cost
from sparsegrad.files import read_json, write_json

HOURS = ("search h", "training h", "h to target")
EXACT = {"method": "SparseGrad exact"}


def on(cpu: str) -> dict[str, dict[str, dict[str, str]]]:
    return {"environment": {"hardware": {"device": "cpu", "cpu": cpu}}}


def spread(cases: Cases) -> None:
    """The runs of one arm come from a machine that is ten times as slow."""
    cases.healthy()
    for task in ("sst2", "mrpc"):
        for seed in SEEDS:
            cases.run("sparsegrad", task, seed, 0.86, speed={"steps_per_second": 0.01}, **on("slow"))


def test_runs_from_several_machines_have_no_hours(cases: Cases) -> None:
    spread(cases)
    main, *_ = main_tables.tables(of(cases))
    assert [cell(main, column, **EXACT) for column in HOURS] == ["", "", "reached"]
    assert clock.AT_NOTHING in main.notes
    assert score_hours.points(of(cases), "evidence_paper") == []


def test_a_target_that_is_missed_is_said_without_hours_too(cases: Cases) -> None:
    spread(cases)
    main, *_ = main_tables.tables(of(cases))
    assert cell(main, "h to target", method="LoRA, alpha = 2 rank").startswith("not reached by 3 of 3 seeds")


def test_hours_at_the_speed_of_the_benchmark_do_not_depend_on_the_machines(cases: Cases) -> None:
    costs = {arm: Cost(speed, 100.0) for arm, speed in (("full", 4.0), ("lora_peft", 5.0), ("exact", 2.0))}
    found = []
    for make in (cases.healthy, lambda: spread(cases)):
        make()
        evidence = load_evidence(of(cases))
        block = evidence.blocks["evidence_paper"]
        one = clock.make_clock(block, costs)
        found.append([clock.training_hours(block, arm, ["sst2", "mrpc"], one) for arm in block.arms])
        assert one.about == clock.AT_BENCHMARK
    assert found[0] == found[1] == pytest.approx([60 / speed / 3600 for speed in (4.0, 5.0, 2.0)]), "30 steps, 2 tasks"


def test_an_arm_that_the_benchmark_lacks_leaves_the_runs_own_speeds(cases: Cases) -> None:
    cases.healthy()
    block = load_evidence(of(cases)).blocks["evidence_paper"]
    one = clock.make_clock(block, {"full": Cost(4.0, 100.0)})
    assert (one.about, one.speeds) == (clock.AT_RUNS, None)


def test_hours_of_a_search_count_the_evaluations_of_finished_trials(cases: Cases) -> None:
    cases.healthy()
    trials = cases.results / "studies" / "evidence-minilm-full-sst2" / "trials.csv"
    trials.write_text("trial,state,value,seconds,evaluations\n0,complete,0.8,5,10\n1,pruned,,3,5\n2,fail,,1,9\n")
    assert count(cases) is None, "the records do not say how many steps lie between evaluations"
    for path in (cases.results / "runs" / "evidence_paper").glob("full-sst2-*.json"):
        set_interval(path, 90)
    assert count(cases) == 15 * 90
    trials.unlink()
    assert count(cases) is None


@pytest.mark.parametrize(("cpu", "hours"), [("of the runs", 0.5), ("another", None)])
def test_a_search_has_hours_only_on_the_machine_of_the_runs(cases: Cases, cpu: str, hours: float | None) -> None:
    cases.plan()
    cases.study("full", "sst2")
    for seed in SEEDS:
        cases.run("full", "sst2", seed, 0.85, **on("of the runs"))
    cases.run("full", "sst2", 1, 0.85, folder="evidence-minilm-full-sst2", experiment="evidence_paper", **on(cpu))
    block = load_evidence(of(cases)).blocks["evidence_paper"]
    one, runs = clock.make_clock(block, {}), list(block.of("full", "sst2").values())
    assert one.about == clock.AT_RUNS
    assert one.search_hours("full", runs, Searches(cases.results)) == hours


def test_a_best_rate_at_an_edge_of_its_search_is_named(cases: Cases) -> None:
    cases.healthy()
    path = cases.results / "studies" / "evidence-minilm-full-sst2" / "summary.json"
    write_json(path, {**read_json(path), "at_edge": True})
    named = [note for note in main_tables.tables(of(cases))[0].notes if note.startswith("A better rate may lie")]
    assert [note.rpartition(": ")[2] for note in named] == ["evidence-minilm-full-sst2."]


def count(cases: Cases) -> int | None:
    block = load_evidence(of(cases)).blocks["evidence_paper"]
    return Searches(cases.results).count_steps(block.of("full", "sst2").values())


def set_interval(path: Path, steps: int) -> None:
    record = read_json(path)
    record["config"]["protocol"]["eval_steps"] = steps
    write_json(path, record)
