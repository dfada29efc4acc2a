"""The tables of SparseGrad exact minus each other method, and of the orders of the methods."""

from __future__ import annotations

import pytest
from evidence_cases import SEEDS, Cases
from test_experiments_report import cell
from test_report_claims import of

from experiments.report import command as report
from experiments.report import page
from experiments.report.evidence import load_evidence
from experiments.report.tables import exact, main_tables
from experiments.report.tables.base import Table

MINUS = "SparseGrad exact minus this"
LORA = {"method": "LoRA, alpha = 2 rank"}


def tables(cases: Cases, folder: str = "evidence_paper") -> tuple[Table, Table]:
    """Differences and orders."""
    differences, orders = exact.block_tables(of(cases), folder)
    return differences, orders


def test_the_differences_are_those_of_the_statistics(cases: Cases) -> None:
    cases.healthy()
    table, _ = tables(cases)
    evidence = load_evidence(of(cases))
    found = evidence.compare("evidence_paper", "sparsegrad", "lora_tuned", ["sst2", "mrpc"])
    assert found is not None
    for column, interval in (("95 %", found.interval_of(1)), ("95 % jointly", found.interval_of(2))):
        assert cell(table, column, **LORA) == f"{interval[0]:+.2f} to {interval[1]:+.2f}"
    for column, smallest in (("detectable alone", found.detectable(1)), ("detectable", found.detectable(2))):
        assert cell(table, column, **LORA) == f"{smallest:.2f}"
    assert cell(table, MINUS, **LORA) == "+6.00"
    assert cell(table, MINUS, method="SparseGrad exact") == "reference"
    assert cell(table, "average", method="SparseGrad exact") == "86.00 ± 0.33 (3)"
    (single,) = [evidence.compare("evidence_paper", "sparsegrad", "lora_tuned", ["sst2"])]
    said = f"+6.00 ({single.interval[0]:+.2f} to {single.interval[1]:+.2f})"
    assert cell(table, "sst2 alone", **LORA) == cell(table, "on sst2", **LORA) == said


def test_the_orders_of_both_kinds_of_rows_are_compared(cases: Cases) -> None:
    """On held-out rows, full fine-tuning is the best; on validation rows, SparseGrad."""
    cases.healthy()
    for seed in SEEDS:
        cases.run("full", "sst2", seed, 0.85, steps=((10, 0.97), (20, 0.98), (30, 0.95)))
    _, orders = tables(cases)
    assert cell(orders, "Spearman", task="sst2") == "0.50"
    assert cell(orders, "Spearman", task="mrpc") == "1.00"
    names = [one.rpartition(" ")[0] for one in cell(orders, "held-out rows", task="sst2").split("; ")]
    assert names == ["full fine-tuning", "SparseGrad exact", "LoRA, alpha = 2 rank"]
    assert cell(orders, "validation rows", task="sst2").startswith("SparseGrad exact 86.00; full fine-tuning 85.00; ")


def test_a_block_has_them_as_soon_as_a_method_shares_enough_seeds(cases: Cases) -> None:
    assert exact.tables(of(cases)) == []
    cases.healthy()
    rules = {"regime": "mlp_only", "gate_experiment": "evidence_paper", "floors": ["random_mask"]}
    methods = ("lora_tuned", "sparsegrad", "meprop", "random_mask")
    cases.plan("evidence_mlp_only", rules, grid={"task": "sst2,mrpc", "seed": "42", "method": ",".join(methods)})
    for number, seed in enumerate(SEEDS):
        assert exact.block_tables(of(cases), "evidence_mlp_only") == []
        for place, method in enumerate(methods):
            cases.run(method, "sst2", seed, 0.8 + 0.02 * place + 0.004 * number, folder="evidence_mlp_only")
    for method, seeds in (("sparsegrad", SEEDS), ("lora_tuned", SEEDS), ("meprop", SEEDS[:1])):
        for number, seed in enumerate(seeds):
            cases.run(method, "mrpc", seed, 0.8 + 0.004 * number, folder="evidence_mlp_only")
    table, orders = tables(cases, "evidence_mlp_only")
    assert cell(table, MINUS, method="MeProp").endswith(" (sst2 only)")
    assert "(" not in cell(table, "on mrpc", method="MeProp"), "no interval from one seed"
    assert cell(orders, "methods", task="mrpc") == "2"
    assert cell(orders, "methods", task="sst2") == "3", "without the floor"
    notes = "\n".join(table.notes)
    assert "Floors, to read the other scores by: random mask." in notes
    assert "mean ± sample std over seeds (number of seeds)" in notes
    assert "has the same runs with the reference LoRA, alpha = 2 rank." in notes
    assert "Left out, as floors, to read the other scores by: random mask." in orders.notes
    assert "Left out, with fewer than 3 seeds: MeProp on mrpc." in orders.notes
    assert not any("evidence_" in note for note in (*table.notes, *orders.notes)), "the page shows no folders"


def test_different_seeds_and_unpaired_ones_are_explained(cases: Cases) -> None:
    cases.healthy()
    grid = {"task": "sst2,mrpc", "seed": "42,3705,2023,37,7777", "method": "full,lora_tuned,sparsegrad"}
    cases.plan(rules={"seeds": [*SEEDS, 37, 7777]}, grid=grid)
    for task, seeds in (("sst2", (*SEEDS, 37, 7777)), ("mrpc", SEEDS)):
        for number, seed in enumerate(seeds):
            for arm, accuracy in (("full", 0.85), ("lora_tuned", 0.8), ("sparsegrad", 0.86)):
                if arm == "sparsegrad" or seed in SEEDS:
                    cases.run(arm, task, seed, accuracy + 0.004 * (number % 3))
    table, orders = tables(cases)
    assert cell(table, "average", method="SparseGrad exact").endswith("(3 to 5, 3 common)")
    notes = "\n".join(table.notes)
    assert "such as (3 to 5, 3 common)" in notes
    assert "; ±: over the common ones alone." in notes
    assert "left out of differences: full fine-tuning 2, LoRA, alpha = 2 rank 2." in notes
    assert not any("floor" in note.lower() for note in (*table.notes, *orders.notes)), "there is none"


def test_a_task_that_cannot_be_compared_is_left_out(cases: Cases) -> None:
    cases.healthy()
    for seed in SEEDS:
        cases.run("full", "sst2", seed, 0.5)
    table, orders = tables(cases)
    assert not [name for name in table.frame.columns if "sst2" in name]
    assert list(orders.frame["task"]) == ["mrpc"]
    said = "sst2 is left out, as it is not comparable: full fine-tuning reached 50.00 of 60 on sst2."
    assert said in table.notes
    assert said in orders.notes


@pytest.mark.parametrize("name", ["evidence", "evidence_paper"])
def test_the_command_of_a_block_writes_them(cases: Cases, name: str) -> None:
    cases.healthy()
    assert report.main([name, "--results-dir", str(cases.results)]) == 0
    written = {path.name for path in (cases.results / "tables").iterdir()}
    wanted = {f"evidence_paper_{of}.{suffix}" for of in ("exact", "orders") for suffix in ("md", "csv", "tex")}
    assert wanted <= written


def test_the_page_has_them_below_the_main_tables_of_their_block(cases: Cases) -> None:
    cases.healthy()
    made = of(cases)
    text = page.write_page(made, [*main_tables.tables(made), *exact.tables(made)], {}).read_text()
    headings = [part.partition('"')[0] for part in text.split('<h2 id="')[1:]]
    block = ["evidence_paper", "evidence_paper_tasks", "evidence_paper_exact", "evidence_paper_orders"]
    assert [name for name in headings if name.startswith("evidence_paper")] == block
    assert headings.index("evidence_paper_orders") < headings.index("evidence_mlp_only")
    contents = text.split("</nav>")[0]
    assert 'href="#evidence_paper_exact"' in contents
    assert 'href="#evidence_paper_orders"' not in contents
