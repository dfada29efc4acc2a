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

import pytest
from conftest import ROOT
from test_sweep_dashboard import BROWSER

from experiments import figures, findings, page, published, render, report
from experiments.collect import collect
from experiments.stats import summarise, welch_interval
from experiments.tables import (
    ablation,
    accuracy,
    architecture,
    basis,
    calibration,
    correspondence,
    hyperparams,
    llama,
    speed,
    verdict,
)
from experiments.tables.base import MINI_MARK, Context
from sparsegrad.errors import UserError
from sparsegrad.records import write_json
from sparsegrad.sweeps.hparams import read_rows


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
    """A folder with three seeds of two methods on one mini task, and a benchmark."""
    for method, values in (("full", (0.80, 0.82, 0.84)), ("lora", (0.70, 0.74, None))):
        for seed, value in zip((42, 3705, 2023), values, strict=True):
            write(tmp_path, f"mini/{method}{seed}", record(method, "snippets", seed, value))
    return tmp_path


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


def test_logs_give_the_averages_that_are_known_of_them(results: Path) -> None:
    tasks = tuple(published.TASKS.values())
    found = accuracy.logs("bert_base", "full", accuracy.AVERAGE, tasks)
    assert found is not None
    assert found.mean == pytest.approx(82.0, abs=0.3)
    assert found.n == 8


def test_welch_interval_by_hand() -> None:
    # Equal counts and variances: the pooled t of 4 degrees of freedom, 2.776.
    low, high = welch_interval([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((-3 - 2.776445 * (2 / 3) ** 0.5, -3 + 2.776445 * (2 / 3) ** 0.5), abs=1e-5)
    assert welch_interval([1.0], [2.0, 3.0]) is None
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
    cells = [("full", 2.0, 100.0), ("full", 4.0, 100.0), ("full", 3.0, 100.0), ("merged", 6.0, 50.0)]
    rows = [
        {"setting": "s", "arm": arm, "repeat": i, "status": "complete", "steps_per_second": speed, "peak_mib": peak}
        for i, (arm, speed, peak) in enumerate(cells)
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
    assert (cell(table, "of full", arm="merged"), cell(table, "of full ", arm="merged")) == ("2.00", "0.50")


def bench(results: Path, name: str, cells: list[dict[str, Any]], **setting: Any) -> None:
    """A benchmark of one machine, one setting each for padded and dynamic batches."""
    about = {"shape": "roberta_base", "batch": 16, "precision": "fp32", "mode": "eager", "rest": "trained", **setting}
    settings = {
        "padded": {**about, "padding": "max_length", "task": "cola"},
        "dynamic": {**about, "padding": "longest", "task": "mrpc"},
    }
    write_json(results / "bench" / f"{name}.json", {"schema": 1, "settings": settings, "cells": cells})


def measurement(setting: str, arm: str, speed: float | None, peak: float = 100.0) -> dict[str, Any]:
    status: dict[str, Any] = {"status": "complete", "steps_per_second": speed, "peak_mib": peak}
    failed = {"status": "failed", "reason": "out of memory"}
    return {"setting": setting, "arm": arm, "repeat": 0, **(failed if speed is None else status)}


def test_tables_3_7_and_8_show_ours_beside_three_figures_of_others(results: Path) -> None:
    bench(
        results, "gpu", [measurement("padded", "full", 9.0), measurement("padded", "fast", None)], label="RoBERTa-base"
    )
    bench(results, "cpu", [measurement("dynamic", "full", 2.0, 55.0)], label="RoBERTa-base; scaled: 1 of 12 blocks")
    three, seven, eight, _ = speed.tables(context(results))
    assert cell(three, "ours padded, steps/s, gpu", arm="full") == "9"
    assert cell(three, "ours padded, steps/s, gpu", arm="fast") == "failed: out of memory"
    assert cell(three, "ours padded, MiB, cpu (scaled)", arm="full") == "missing"
    assert (cell(three, "published steps/s", arm="full"), cell(three, "true steps/s", arm="full")) == ("4.11", "3.87")
    assert any("cpu: RoBERTa-base; scaled: 1 of 12 blocks." in note for note in three.notes)
    assert cell(seven, "ours dynamic, steps/s, cpu (scaled)", arm="full", task="mrpc") == "2"
    assert cell(seven, "ours dynamic, steps/s, cpu (scaled)", arm="full", task="cola") == "missing"
    assert cell(seven, "ours padded, steps/s, gpu", arm="full", task="rte") == "9"
    assert cell(eight, "ours dynamic, MiB, cpu (scaled)", arm="full", task="mrpc") == "55"
    assert cell(eight, "published", arm="merged", task="mrpc") == "none"


def test_damaged_benchmarks_and_summaries_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("bench/torn.json", "studies/one/summary.json"):
        (results / place).parent.mkdir(parents=True)
        (results / place).write_text('{"schema": 1')
    write_json(results / "bench" / "old.json", {"schema": 0})
    assert report.main(["table3", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().err
    assert "bench/torn.json: not a readable benchmark (JSONDecodeError)" in said
    assert "bench/old.json: benchmark schema 0, this version reads 1" in said
    assert "studies/one/summary.json: not a readable summary (JSONDecodeError)" in said


def test_a_damaged_figure_is_one_line_with_the_remedy(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "figures").mkdir()
    (results / "figures" / "figure2.json").write_text("{")
    assert report.main(["figure2", "--results-dir", str(results)]) == 2
    said = capsys.readouterr().err
    assert "figure2.json is damaged" in said
    assert "make reproduce-figure2 measures it again" in said


def test_a_wrong_column_of_the_searched_values_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "published_hyperparams.csv").write_text(
        "table,model,method,task,batch,lr\n13,bert_base,full,cola,8,1\n"
    )
    with pytest.raises(UserError, match=r"has wrong columns \(batch, batch_size\): it needs exactly table, model"):
        read_rows("published_hyperparams.csv", tmp_path)


def test_tables_13_to_15_take_a_study_from_its_summary(results: Path) -> None:
    best = {"value": 0.5123, "values": {"train.batch_size": 16, "train.lr": 2e-5}}
    of = {"metric": "accuracy", "objective": "heldout", "best": best, "trials": {"complete": 40, "pruned": 0}}
    labels = {"model": "bert_base", "method": "sparsegrad", "task": "cola"}
    write_json(results / "studies" / "s" / "summary.json", {**of, "study": "s", "labels": labels})
    write_json(results / "studies" / "mini" / "summary.json", {**of, "study": "mini"})
    tables = {table.name: table for table in hyperparams.tables(context(results))}
    row = {"task": "cola", "study": "s"}
    assert cell(tables["table13"], "found here", **row) == "16 / 2.00e-05"
    assert cell(tables["table13"], "score", **row) == "0.5123"
    assert tables["table13"].coverage == (1, 8)
    assert cell(tables["table14"], "found here", task="cola") == "missing"
    assert list(tables["table13_mini"].frame["study"]) == ["mini"]


def test_the_verdict_compares_on_the_tasks_that_both_have(results: Path) -> None:
    for seed, full, sparse in ((42, 0.50, 0.60), (3705, 0.52, 0.62), (2023, 0.54, 0.64)):
        write(results, f"mini/f{seed}", record("full", "cola", seed, full))
        write(results, f"mini/s{seed}", record("sparsegrad", "cola", seed, sparse))
        write(results, f"mini/m{seed}", record("sparsegrad", "mrpc", seed, 0.99))  # full has no such runs
    found = verdict.compare(context(results), "paper", "sparsegrad", "full")
    assert (found.tasks, found.higher, found.lower) == (("cola",), ("cola*",), ())
    assert found.difference == pytest.approx(10.0)
    low, high = found.interval or (0.0, 0.0)
    half = 2.776445 * (4 * 2 / 3) ** 0.5  # equal variances of 4: the t of 4 degrees of freedom
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=1e-4)
    assert found.verdict == "better"
    table = verdict.table(context(results))
    row = {"protocol": "paper", "method": "sparsegrad"}
    assert cell(table, "tasks", against="full", **row) == "1 of 4"
    assert cell(table, "difference", against="lora", **row) == "missing"  # LoRA has snippets alone
    lora = verdict.compare(context(results), "paper", "lora", "full")
    assert (lora.lower, lora.higher) == (("snippets",), ())
    assert verdict.compare(context(results), "heldout", "lora", "full").verdict == "missing"


def test_one_seed_is_too_few_for_a_verdict(results: Path) -> None:
    write(results, "mini/s", record("sparsegrad", "snippets", 42, 0.9))
    found = verdict.compare(context(results), "paper", "sparsegrad", "full")
    assert (found.interval, found.verdict) == (None, "too few seeds")
    assert found.difference == pytest.approx(8.0)


def test_findings_have_data_or_are_left_out(results: Path) -> None:
    assert not any("sparsegrad" in question for question in findings.table(context(results)).frame["question"])
    for seed, value in ((42, 0.7), (3705, 0.71)):
        write(results, f"mini/s{seed}", record("sparsegrad", "snippets", seed, value))
    bench(results, "gpu", [measurement("padded", "merged", 6.0), measurement("padded", "layer_regular", 2.0)])
    frame = findings.table(context(results)).frame.set_index("question")["answer"]
    assert frame["MiniLM, protocol paper: how does sparsegrad do?"].startswith("-11.50 points against full over 1 task")
    assert frame["How fast on gpu, whole model?"] == "merged 3.00 times the steps/s of layer_regular"
    assert "Table 4, LoRA: printed 83.7, its cells 84.86" in frame["Which printed averages contradict their own cells?"]
    assert not any("energy" in question for question in frame.index)


def test_a_cell_of_the_page_leads_to_records_curves_environment_and_rerun(results: Path) -> None:
    log = {
        "losses": [{"step": 10, "loss": 0.9}, {"step": 20, "loss": 0.3}],
        "evaluations": [{"step": 20, "accuracy": 0.9}],
    }
    hardware = {
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "git": {"commit": "0123456789", "dirty": True},
    }
    write(results, "mini/full42", record("full", "snippets", 42, 0.8, **log, environment=hardware))
    of = context(results)
    tables = [accuracy.mini(of), accuracy.mini_overview(of)]
    text = page.write_page(of, tables, {}).read_text()
    anchor = "table5_mini--full-snippets-paper"
    assert text.count(f'href="#{anchor}">82.00 ± 2.00</a>') == 2, "a link from either table"
    detail = text.split(f'id="{anchor}"')[1].split("</div>")[0]
    assert 'href="../runs/mini/full42.json"' in detail
    assert "commit 0123456 with changes" in detail
    assert "training loss: 0.3 to 0.9, 20 steps" in detail
    assert "<polyline" in detail
    assert "<circle" in detail, "one evaluation is a point"
    assert "a processor, 2 cores, 1 threads" in detail
    assert "make reproduce-table5 SCALE=mini ARGS=&#34;method=full task=snippets seed=2023,3705,42&#34;" in detail


def test_a_table_without_anything_of_ours_is_folded_away(results: Path) -> None:
    of = context(results)
    text = page.write_page(of, [accuracy.per_task(of, 4), accuracy.mini(of)], {}).read_text()
    assert '<details class="bare" id="table4">' in text
    assert '<h2 id="table5_mini">' in text
    assert "<b>2 of 70</b>cells of the mini tables measured" in text
    assert (
        "<b>0 of 45</b>cells of the paper&#39;s models measured" in text or "<b>0 of 45</b>cells of the paper's" in text
    )


def test_section8_finds_what_the_printed_megabytes_count() -> None:
    for one in calibration.PRINTED:
        numbers = calibration.arithmetic(one)
        closest = min(numbers, key=lambda name: abs(numbers[name] - calibration._in_mb(one.memory)))
        assert closest == "gradients of 1 weight, 30 steps"
        assert numbers[closest] == pytest.approx(calibration._in_mb(one.memory), rel=0.05)


def test_table6_holds_the_losses_of_our_runs(results: Path) -> None:
    for seed, loss in ((42, 1.25), (3705, 1.35)):
        of = record("lora", "oasst1", seed, 0.0)
        write(results, f"table6_mini/{seed}", {**of, "result": {"metric": "nll", "value": loss}})
    table = llama.table(context(results))
    assert cell(table, "ours, loss", model=f"minilm ({MINI_MARK})", method="lora") == "1.300 ± 0.071"
    assert cell(table, "published loss", model="llama2_7b", method="lora") == "1.249 ± 0.05"


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


HARNESS = """<!doctype html><title>waiting</title><iframe src="report/index.html" width="400" height="800"></iframe>
<script>addEventListener("load", () => { const page = document.querySelector("iframe").contentDocument;
document.title = JSON.stringify({width: page.documentElement.scrollWidth, inner: page.defaultView.innerWidth,
dark: page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches,
paper: getComputedStyle(page.body).backgroundColor, drawn: [...page.images].every(image => image.naturalWidth > 0),
tables: [...page.querySelectorAll("table")].filter(table => table.rows.length > 1).length}) })</script>"""


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
    assert found["dark"] is dark
    assert found["paper"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert "CONSOLE" not in shown.stderr, shown.stderr
