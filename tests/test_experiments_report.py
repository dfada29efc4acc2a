"""Tables and page from records on disk: what is shown, what is refused; the same input gives the same bytes."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from conftest import ROOT
from test_sweep_dashboard import BROWSER

from experiments import figures, published, render, report
from experiments.collect import collect
from experiments.mtbench.scores import ModelScores
from experiments.stats import summarise, welch_interval
from experiments.tables import ablation, accuracy, architecture, basis, calibration, correspondence, llama, speed
from experiments.tables.base import MINI_MARK, Context
from experiments.tables.grades import grade
from sparsegrad.errors import UserError
from sparsegrad.records import write_json


def record(method: str, task: str, seed: int, value: float | None, **more: Any) -> dict[str, Any]:
    """What tables read of a record; None: a failed run."""
    config = {
        "model": {"name": "minilm"},
        "method": {"name": method, "keep": more.pop("keep", None)},
        "task": {"name": task, "main_metric": "accuracy"},
        "protocol": {"name": more.pop("protocol", "paper")},
        "seed": seed,
    }
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:15:00+00:00"}
    status = {"status": "failed", "reason": "the loss is not a finite number"}
    if value is not None:
        status = {"status": "complete", "result": {"value": value}}  # type: ignore[dict-item]
    return {"schema": 1, "key": "0", "config": config, "environment": times, **status, **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with three seeds of two methods on one mini task."""
    return fill(tmp_path)


def fill(results: Path) -> Path:
    """Write the records of `results`."""
    for method, values in (("full", (0.80, 0.82, 0.84)), ("lora", (0.70, 0.74, None))):
        for seed, value in zip((42, 3705, 2023), values, strict=True):
            write(results, f"mini/{method}{seed}", record(method, "snippets", seed, value))
    return results


def write(results: Path, name: str, content: Any) -> None:
    write_json(results / "runs" / f"{name}.json", content)


def context(results: Path) -> Context:
    return Context(results, collect(results / "runs"), "mini")


def cell(table: Any, column: str, **where: str) -> str:
    rows = table.frame
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return str(rows.iloc[0][column])


def test_a_run_of_both_protocols_counts_under_either(results: Path) -> None:
    both = {"status": "complete", "result": {"value": 0.5, "best_on_validation": {"value": 0.6, "step": 9}}}
    write(results, "mini/both", record("meprop", "cola", 42, 0.5, protocol="both", **both))
    write(results, "mini/died", record("meprop", "stsb", 42, None, protocol="both"))
    table = accuracy.mini(context(results))
    of = {"method": "meprop", "task": "cola"}
    assert cell(table, "ours", protocol="heldout", **of).startswith("50.0")
    assert cell(table, "ours", protocol="paper", **of).startswith("60.0")
    assert all(
        "failed" in cell(table, "ours", method="meprop", task="stsb", protocol=name) for name in ("heldout", "paper")
    )


def test_a_cell_holds_mean_spread_count_interval_protocol_and_cost(results: Path) -> None:
    table = accuracy.mini(context(results))
    of = {"method": "full", "task": "snippets", "protocol": "paper"}
    assert cell(table, "ours", **of) == "82.00 ± 2.00"
    assert (cell(table, "n", **of), cell(table, "hours", **of)) == ("3", "0.75")
    lora = {**of, "method": "lora"}
    assert cell(table, "ours", **lora) == "72.00 ± 2.83"
    assert cell(table, "n", **lora) == "2 of 3"
    low, high = (float(part) for part in cell(table, "vs full, 95 %", **lora).split(" to "))
    assert low < -10 < high
    assert MINI_MARK in table.title
    assert [path.stem for path in table.records["full snippets paper"]] == ["full2023", "full3705", "full42"]


def test_a_cell_without_seeds_is_missing_and_never_averaged(results: Path) -> None:
    table = accuracy.mini(context(results))
    assert cell(table, "ours", method="full", task="cola", protocol="paper") == "missing"
    assert cell(table, "ours", method="full", task="average", protocol="paper") == "missing"
    assert cell(table, "n", method="full", task="cola", protocol="paper") == "0 of 3"


def test_a_failed_cell_shows_its_reason_and_a_pruned_trial_is_no_failure(results: Path) -> None:
    write(results, "mini/a", record("meprop", "mrpc", 42, None))
    write(results, "mini/b", record("full", "mrpc", 42, None, reason="pruned by the sweep after evaluation 2, step 24"))
    table = accuracy.mini(context(results))
    shown = cell(table, "ours", method="meprop", task="mrpc", protocol="paper")
    assert shown == "failed: seed 42: the loss is not a finite number"
    assert cell(table, "ours", method="full", task="mrpc", protocol="paper") == "missing"


def test_bad_records_are_named_skipped_and_counted(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(results, "mini/future", {**record("full", "cola", 42, 0.5), "schema": 99})
    (results / "runs" / "mini" / "torn.json").write_text('{"schema": 1, "config')
    write(results, "mini/hollow", {"schema": 1, "status": "complete"})
    write(results, "mini/list", {"schema": 1, "status": "complete", "config": []})
    assert report.main(["table5", "--scale", "mini", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().err
    assert "4 records skipped: 1 another schema, 3 damaged" in said
    assert "mini/future.json: record schema 99, this version reads 1" in said
    for name in ("torn", "hollow", "list"):
        assert f"mini/{name}.json: not a readable record" in said


def test_records_that_disagree_are_named_and_not_used(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(results, "mini/other", record("full", "snippets", 42, 0.99))
    assert cell(accuracy.mini(context(results)), "n", method="full", task="snippets", protocol="paper") == "2 of 3"
    assert report.main(["table5", "--scale", "mini", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().err
    assert "mini/minilm/full/snippets/paper seed 42: records disagree" in said
    assert "full42.json 80.00" in said
    assert "other.json 99.00" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["table16"], "table=table16 is not allowed: choose one of table1"), (["table4", "--scale", "big"], "scale=big")],
)
def test_bad_names_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tables").write_text("a file where the folder should be")
    assert report.main(["table2", "--results-dir", str(tmp_path)]) == 2
    assert "error: cannot write" in capsys.readouterr().err


def test_a_wrong_column_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "published.csv").write_text("table,row,column,score,std\n4,LoRA,AVG,83.7,\n")
    with pytest.raises(UserError, match=r"has wrong columns \(score, value\): it needs exactly table, row, column"):
        published.cells(4, tmp_path)


def test_printed_averages_that_their_cells_contradict_are_marked() -> None:
    assert published.contradicts(4, "LoRA") == " [its cells average 84.86]"
    assert published.contradicts(9, "MeProp") == " [its cells average 81.47]"
    assert published.contradicts(4, "Regular FT") == ""  # 85.6 and 85.69: rounding may do that
    assert published.contradicts(7, "Regular FT") == ""  # 4.11 and 4.075 of cells with one digit
    assert published.contradicts(8, "Regular FT") == " [its cells average 1346.12]"
    assert published.contradicts(8, "SparseGrad, Regular") == ""
    assert "0.8% remained 99.0, 1% remained 94.8" in ablation.implied(12)  # of the column that is lost


def test_logs_give_the_averages_that_are_known_of_them(results: Path) -> None:
    tasks = tuple(published.TASKS.values())
    found = accuracy.logs("bert_base", "full", accuracy.AVERAGE, tasks)
    assert found is not None
    assert found.mean == pytest.approx(82.0, abs=0.3)
    assert found.n == 8
    wider = accuracy.logs("bert_base", "full", accuracy.AVERAGE, tasks, accuracy.LOGGED_SEEDS)
    assert wider is not None
    assert wider.mean == pytest.approx(82.0, abs=0.05)


def test_seeds_that_score_what_one_answer_scores_are_counted(results: Path) -> None:
    for seed, value in ((42, 0.0), (3705, 0.0), (2023, 0.04)):
        write(results, f"mini/c{seed}", record("full", "cola", seed, value))
    for seed, value in ((42, 279 / 408), (3705, 0.70)):
        write(results, f"mini/m{seed}", record("full", "mrpc", seed, value))
    table = accuracy.mini(context(results))
    of = {"method": "full", "protocol": "paper"}
    assert cell(table, "ours", task="cola", **of) == "1.33 ± 2.31 (2 const.)"
    assert cell(table, "ours", task="mrpc", **of).endswith(" (1 const.)")
    assert "const" not in cell(table, "ours", task="snippets", **of)


def test_welch_interval_by_hand() -> None:
    # Equal counts and variances: the pooled t of 4 degrees of freedom, 2.776.
    low, high = welch_interval([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((-3 - 2.776445 * (2 / 3) ** 0.5, -3 + 2.776445 * (2 / 3) ** 0.5), abs=1e-5)
    assert welch_interval([1.0], [2.0, 3.0]) is None
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) is None, "no spread is no certainty"
    assert summarise([]) is None
    assert str(summarise([1.0])) == "1.00"


def test_table1_counts_the_true_architectures(results: Path) -> None:
    assert sum(architecture.counts("bert_base").values()) == 109_482_240
    assert architecture.counts("llama")["MLP"] == 3 * 4096 * 11008 * 32
    assert architecture.counts("roberta_base")["MLP"] == 12 * (2 * 768 * 3072 + 768 + 3072)


def test_table2_holds_but_for_the_misprint() -> None:
    found = {one.row: one for one in correspondence.checks()}
    assert len(found) == 6
    assert all(one.right < 1e-10 for one in found.values())
    wrong = [row for row, one in found.items() if one.printed is not None and one.printed > 0.1]
    assert wrong == ["Grad Input"]


def test_all_entries_are_compared_with_one_percent(results: Path) -> None:
    assert ablation.whole_against_one_percent(context(results)) == []
    for keep, scores in ((5500, (0.50, 0.52, 0.54)), (ablation.SIZE // 4, (0.60, 0.62, 0.64))):
        for seed, score in zip((42, 3705, 2023), scores, strict=True):
            write(results, f"mini_ablation/{keep}-{seed}", record("sparsegrad", "stsb", seed, score, keep=keep))
    (said,) = ablation.whole_against_one_percent(context(results))
    assert said == "All entries minus 5,500 of them, 95 % Welch: stsb +5.47 to +14.53."


def test_the_ablation_counts_what_is_kept_and_sees_the_copied_row(results: Path) -> None:
    for seed in (42, 3705):
        for task in ablation.MINI_TASKS:
            write(results, f"mini_ablation/{task}{seed}", record("sparsegrad", task, seed, 0.5, keep=5500))
    table = ablation.mini(context(results))
    assert cell(table, "ours", kept="5,500", task="average") == "50.00 ± 0.00"
    assert cell(table, "share", kept="5,500", task="average") == "0.93 %"
    assert [round(point.share, 2) for point in ablation.mini_curve(context(results))] == [0.93]
    assert any("equals the SparseGrad row of Table 9 in all 7 cells" in note for note in ablation.table(
        context(results), 11).notes)  # fmt: skip


def test_speed_takes_medians_and_ratios_within_a_setting(results: Path) -> None:
    setting = {"shape": "roberta_base", "task": "mrpc", "padding": "longest", "batch": 16, "precision": "fp32"}
    cells = [("full", 0, 2.0, 100.0), ("full", 1, 4.0, 100.0), ("full", 2, 3.0, 100.0), ("merged", 1, 6.0, 50.0)]
    rows = [
        {"setting": "s", "arm": arm, "repeat": i, "status": "complete", "steps_per_second": speed, "peak_mib": peak}
        for arm, i, speed, peak in cells
    ]
    failed = {**rows[0], "arm": "fast", "status": "failed", "reason": "no memory"}
    settings = {"s": {**setting, "rest": "trained"}, "other": {**setting, "rest": "frozen"}}
    write_json(results / "bench" / "cpu.json", {"schema": 1, "settings": settings, "cells": [*rows, failed]})
    (results / "bench" / "torn.json").write_text("{")
    table = next(one for one in speed.tables(context(results)) if one.name == "table3_measured")
    assert list(table.frame["arm"]) == ["full", "merged", "fast"]
    assert cell(table, "steps/s", arm="fast") == "failed: no memory"
    assert (cell(table, "n", arm="full"), cell(table, "n", arm="fast")) == ("3", "0")
    assert cell(table, "steps/s", arm="merged") == "6.000"
    assert (cell(table, "of full", arm="merged"), cell(table, "of full ", arm="merged")) == (
        "1.50",
        "0.50",
    )  # of its repeat


def test_section8_finds_what_the_printed_megabytes_count() -> None:
    for one in calibration.PRINTED:
        numbers = calibration.arithmetic(one)
        closest = min(numbers, key=lambda name: abs(numbers[name] - calibration._in_mb(one.memory)))
        assert closest == "gradients of 1 weight, 30 steps"
        assert numbers[closest] == pytest.approx(calibration._in_mb(one.memory), rel=0.05)


def test_section8_scales_a_measurement_that_tells_its_parts_apart(results: Path) -> None:
    parts = {"status": "complete", "seconds": 620.0, "sums_seconds": 20.0, "eigenvectors_seconds": 600.0}
    plain = {"status": "complete", "seconds": 9.0, "peak_mib": 100.0}
    found = {"gram-11008x4096-2": {**parts, "gradients": 2, "peak_mib": 1900.0}, "gram-3072x768-12": plain}
    document = {"schema": 1, "settings": {}, "cells": [], "decompositions": found}
    write_json(results / "bench" / "machine.json", document)
    rows = calibration.table(context(results)).frame
    computed = rows[rows["what"].str.startswith("computed")]
    assert list(computed["seconds"]) == ["7,800 s"]  # 2 kinds, each 330 gradients of 10 s and 600 s
    assert list(rows[rows["what"].str.startswith("measured")]["MB"]) == ["1,992", "105"]


def test_table6_holds_the_losses_of_our_runs(results: Path) -> None:
    for seed, loss in ((42, 1.25), (3705, 1.35)):
        of = record("lora", "oasst1", seed, 0.0)
        write(results, f"table6_mini/{seed}", {**of, "result": {"metric": "nll", "value": loss}})
    table = llama.table(context(results))
    assert cell(table, "ours, loss", model=f"minilm ({MINI_MARK})", method="lora") == "1.300 ± 0.071"
    assert cell(table, "published loss", model="llama2_7b", method="lora") == "1.249 ± 0.05"


def test_runs_of_llama_fill_the_published_rows_of_table6(results: Path) -> None:
    """A second record of one seed that disagrees counts for nothing, the authors' variant stands in rows of its own."""
    of = {**record("lora", "oasst1", 42, 0.0)}
    of["config"]["model"]["name"] = "llama2_7b"
    for name, seed, loss in (
        ("table6/a", 42, 1.25),
        ("table6/b", 3705, 1.35),
        ("table6/c", 7, 1.0),
        ("table6/d", 7, 9.0),
    ):
        config = {**of["config"], "seed": seed}
        write(results, name, {**of, "config": config, "result": {"metric": "nll", "value": loss}})
    write(results, "table6_authors/a", {**of, "result": {"metric": "nll", "value": 2.0}})
    table, where = llama.table(context(results)), {"model": "llama2_7b", "method": "lora"}
    assert cell(table, "ours, loss", experiment="table6", **where) == "1.300 ± 0.071"
    assert (
        cell(table, "difference", experiment="table6", **where),
        cell(table, "n", experiment="table6", **where),
    ) == (
        "+0.051",
        "2",
    )
    assert cell(table, "ours, loss", experiment="table6_authors", **where) == "2.000"
    assert cell(table, "ours, loss", model="llama2_7b", method="full") == "missing"
    assert any("disagree" in line for line in context(results).store.disagreements())


def test_table6_shows_share_loss_before_speed_memory_and_counts_of_our_runs(results: Path) -> None:
    of = record("sparsegrad", "oasst1", 42, 0.0)
    more = {
        "result": {"metric": "nll", "value": 1.25},
        "trainable": {"share": 0.014868},
        "evaluations": [{"step": 0, "nll": 1.5}, {"step": 9, "nll": 1.25}],
        "speed": {"steps_per_second": 0.333},
        "memory": {"resident_mib": 1910.9},
        "data": {"counts": {"train_conversations": 560, "validation_conversations": 12}},
    }
    write(results, "table6_mini/a", {**of, **more})
    table = llama.table(context(results))
    where = {"model": f"minilm ({MINI_MARK})", "method": "sparsegrad"}
    found = [cell(table, name, **where) for name in ("trainable", "loss before", "steps/s", "peak MiB", "judge")]
    assert found == ["1.49 %", "1.500", "0.33", "1,911", "not judged"]
    assert "Conversations, train / validation: the authors' 44,042 / 2,241; ours 560 / 12." in table.notes


def test_table6_computes_the_papers_shares() -> None:
    """22 % is up, down and gate of 11 blocks; 0.5 % is LoRA on all blocks: the authors' code, not the text."""
    found = llama.paper_shares()
    assert (found["with_gate"], found["full"], found["lora_all"]) == ("22.1 %", "14.7 %", "0.459 %")


def test_table6_names_judge_and_day(results: Path) -> None:
    scores = [graded("minilm-lora-1", 4.0), graded("minilm-lora-2", 5.0), graded("minilm-lora_tuned", 9.0)]
    found = grade(scores, "minilm", "lora")
    assert found == {"judge's score": "4.50", "judge": "gpt-4, 2026-01-02, 6 of 8 turns"}
    assert grade([graded("minilm-lora", None)], "minilm", "lora")["judge"] == "not judged"
    assert grade(scores, "minilm", "full") == {"judge's score": "", "judge": "not judged"}


def graded(name: str, mean: float | None) -> ModelScores:
    none = mean is None
    return ModelScores(
        model=name, judge=None if none else "gpt-4", turn1=mean, turn2=mean, mean=mean, categories={},
        judged=0 if none else 3, unparsable=0, unjudged=4 if none else 1, date=None if none else "2026-01-02",
    )  # fmt: skip


def test_table6_and_basis_study_say_what_is_missing(results: Path) -> None:
    assert any(note.startswith("Missing: runs of task oasst1") for note in llama.table(context(results)).notes)
    assert cell(basis.table(context(results)), "energy, output", basis="random") == "missing"


def test_curves_are_drawn_from_the_records(results: Path) -> None:
    for seed, loss in ((42, 0.4), (3705, 0.6)):
        log = {"losses": [{"step": 10, "loss": loss}], "evaluations": [{"step": 10, "loss": 1.0, "accuracy": 0.9}]}
        write(results, f"mini/full{seed}", record("full", "snippets", seed, 0.8, **log))
    of = context(results)
    assert figures._mean_curve(of.store, "full", "snippets", "losses", "loss") == {10: 0.5}
    assert figures._mean_curve(of.store, "full", "snippets", "evaluations", None) == {10: 0.9}
    drawn = figures.draw_all(of)
    assert {path.stem for path in drawn.values()} == {"curves", "ablation"}
    assert all(MINI_MARK in title for title in drawn)
    assert all(path.with_suffix(".pdf").is_file() for path in drawn.values())


def test_latex_and_markdown_are_whole(results: Path) -> None:
    table = accuracy.mini_overview(context(results))
    text = render.latex(table)
    assert r"\toprule" in text
    assert r"82.00 $\pm$ 2.00" in text
    assert "sparsegrad\\_fast" in text
    assert text.count(r"\\") == len(table.frame) + 1
    assert "| paper      | full" in render.markdown(table)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the committed records, built anew in another place."""
    results = tmp_path_factory.mktemp("report") / "results"
    wanted = shutil.ignore_patterns("studies.db*", "tables", "report", "*.png", "*.pdf", "*.svg", ".*")
    shutil.copytree(ROOT / "results", results, ignore=wanted)
    assert report.main(["all", "--results-dir", str(results)]) == 0
    return results


def test_the_committed_tables_are_those_of_the_committed_records(committed: Path) -> None:
    built = {path.name: path.read_bytes() for path in (committed / "tables").iterdir()}
    assert built == {path.name: path.read_bytes() for path in (ROOT / "results" / "tables").iterdir()}


def test_the_committed_figures_and_page_are_those_of_the_committed_records(committed: Path) -> None:
    pinned = f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
    if not pinned:
        pytest.skip(f"matplotlib {matplotlib.__version__} draws other bytes than the version of constraints.txt")
    for folder in ("figures", "report"):
        wanted = {path.name: path.read_bytes() for path in (ROOT / "results" / folder).iterdir()}
        found = {path.name: path.read_bytes() for path in (committed / folder).iterdir()}
        assert sorted(name for name in wanted if found.get(name) != wanted[name]) == [], (
            f"results/{folder}: make report"
        )


def test_the_same_records_give_the_same_bytes(committed: Path) -> None:
    outputs = [path for path in committed.rglob("*") if path.is_file() and "runs" not in path.parts]
    before = {path: path.read_bytes() for path in outputs}
    assert report.main(["all", "--results-dir", str(committed)]) == 0
    assert {path: path.read_bytes() for path in outputs} == before


def test_the_page_has_every_table_and_live_links(committed: Path) -> None:
    page = (committed / "report" / "index.html").read_text()
    names = [f"table{number}" for number in range(1, 16)] + ["section8", "basis_study", "table5_mini", "table11_mini"]
    names += ["findings", "mini_verdict"]
    assert all(f'data-name="{name}"' in page for name in names)
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://arxiv.org", "")
    links = [part.split('"')[0] for part in page.split('href="../')[1:]]
    assert links
    assert all((committed / link).is_file() for link in links)
    assert ('href="answers.html"' in page) == (committed / "report" / "answers.html").is_file()


HARNESS = """<!doctype html><title>waiting</title><iframe src="report/index.html" width="400" height="800"></iframe>
<script>addEventListener("load", () => { const page = document.querySelector("iframe").contentDocument;
const folded = page.querySelector("details.bare"), width = page.documentElement.scrollWidth;
if (folded) page.defaultView.location.hash = folded.id;
setTimeout(() => { document.title = JSON.stringify({opened: !folded || folded.open, width: width,
inner: page.defaultView.innerWidth,
dark: page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches,
paper: getComputedStyle(page.body).backgroundColor, drawn: [...page.images].every(image => image.naturalWidth > 0),
tables: [...page.querySelectorAll("table")].filter(table => table.rows.length > 1).length}) }, 200) })</script>"""


@pytest.fixture
def served(committed: Path) -> Iterator[str]:
    """The results folder over HTTP, with a page that looks at the report in a frame 400 pixels wide."""
    (committed / "harness.html").write_text(HARNESS)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(committed))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/harness.html"
    server.shutdown()
    server.server_close()
    (committed / "harness.html").unlink()


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_on_a_phone(served: str, committed: Path, tmp_path: Path, dark: bool) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [chromium, *BROWSER, *theme, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run([*command, "--dump-dom", served], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(shown.stdout.split("<title>")[1].split("</title>")[0].replace("&quot;", '"'))
    assert found["width"] <= found["inner"] <= 400, "the page is wider than a phone"
    assert found["tables"] == len(list((committed / "tables").glob("*.csv"))) + 2  # and contents and environment
    assert found["drawn"], "a figure was not drawn"
    assert found["opened"], "a link to a folded table did not open it"
    assert found["dark"] is dark
    assert found["paper"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert "CONSOLE" not in shown.stderr, shown.stderr
