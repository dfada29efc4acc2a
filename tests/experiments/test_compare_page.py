"""The report page with a comparison: its files and its runs; and the costs of a method that has fewer tasks."""

from __future__ import annotations

import re

import pytest
from evidence_cases import SEEDS, Cases
from test_compare import fill
from test_experiments_report import cell, context

from experiments.report import command as report
from experiments.report.comparison.forgotten import FOLDER
from experiments.report.comparison.table import make_table
from experiments.report.gates import Health
from experiments.report.intervals import Noise
from experiments.report.page import write_page
from experiments.report.plans import read_plan as read_stored_plan
from experiments.report.stats import Difference
from experiments.report.tables.evidence_cells import format_difference
from sparsegrad.files import write_json


@pytest.fixture
def compared(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> Cases:
    """Three methods on two tasks; the runs of one of them are those of another plan."""
    monkeypatch.setattr(
        "experiments.report.comparison.block.read_plan", lambda name: read_stored_plan(name, cases.conf)
    )
    fill(cases)
    cases.plan("compare_smollm2", {"gates": {}}, grid={"task": "oasst1", "seed": "42", "method": "lora_tuned"})
    return cases


def test_every_link_of_the_page_leads_somewhere(compared: Cases) -> None:
    assert report.main(["all", "--results-dir", str(compared.results)]) == 0
    page = compared.results / "report" / "index.html"
    text = re.sub(r'base64,[^"]+', "", page.read_text())  # an image may contain these letters
    ids, links = re.findall(r' id="([^"]+)"', text), set(re.findall(r'href="([^"]+)"', text))
    assert len(set(ids)) == len(ids), "an id twice"
    inside = {link for link in links if link.startswith("#")}
    assert {link.removeprefix("#") for link in inside} <= set(ids)
    files = {link for link in links - inside if not link.startswith(("http", "data:"))}
    assert sorted(link for link in files if not (page.parent / link).is_file()) == []
    assert {f"../compare/compare.{suffix}" for suffix in ("md", "csv", "tex", "pdf")} <= files


def test_a_score_leads_to_its_runs(compared: Cases) -> None:
    for seed in SEEDS:
        compared.run("hra", "sst2", seed, 0.9, folder="compare")
    made = context(compared.results)
    text = write_page(made, *report.write_comparisons(made)).read_text()
    for anchor, record in (
        ("compare--dora-sst2", "compare/dora-sst2-42.json"),
        ("compare--sparsegrad-exact-mrpc", "evidence_mlp_only/sparsegrad-mrpc-42.json"),
        ("compare--hra-sst2-only-sst2", "compare/hra-sst2-42.json"),
    ):
        assert f'href="#{anchor}"' in text
        assert f'href="../runs/{record}"' in text.split(f'id="{anchor}"')[1].split("</div>")[0]


def test_what_a_partial_row_costs_is_that_of_its_tasks(compared: Cases) -> None:
    """Runs on a task with too few seeds, at another speed and with another memory, do not change it."""
    for task, seeds, speed, peak in (("sst2", SEEDS, 2.0, 300.0), ("mrpc", SEEDS[:2], 9.0, 900.0)):
        for seed in seeds:
            about = {"speed": {"steps_per_second": speed}, "memory": {"train_mib": peak}}
            path = compared.run("hra", task, seed, 0.9, folder="compare", **about)
            write_json(compared.results / FOLDER / f"{path.stem}.json", {"before": 2.0, "after": 2.0 + peak / 1000})
    table, _ = make_table(context(compared.results), "compare")
    row = {"method": "hra (sst2 only)"}
    assert cell(table, "steps/s", **row) == "2.00"
    assert cell(table, "peak MiB", **row) == "300"
    assert cell(table, "forgetting", **row) == "+0.300 (3)"


@pytest.mark.parametrize(
    ("value", "noise", "said"), [(-0.0571, None, "-0.06"), (-0.0571, Noise(1e-6, 0.0, 0.0, 2.0), "-0.057")]
)
def test_a_difference_has_a_third_digit_only_where_its_interval_needs_it(
    value: float, noise: Noise | None, said: str
) -> None:
    one = Difference(value, noise, seeds=3, left_out=0, tasks=("sst2",))
    health = Health(reasons=(), gate=None, reached=None, improving=(0, 3), missing=())
    assert format_difference(one, None, False, {"sst2": health}, 3, ["sst2"], False)["difference"] == said
