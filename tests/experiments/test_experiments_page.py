"""Our values next to those of others, findings, and details of cells on the page."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_experiments_report import FOLDER, cell, context, fill, record, write

from experiments.bench.presets import paper_setting
from experiments.report import command as report
from experiments.report import findings, page
from experiments.report.bench_ratios import machine_ratios
from experiments.report.tables import accuracy, architecture, hyperparams, main_tables, speed
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.sweeps.hparams import read_rows


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with three seeds of two methods on one task of Table 9."""
    return fill(tmp_path)


def bench(results: Path, name: str, cells: list[dict[str, Any]], **setting: Any) -> None:
    """Write a benchmark of one machine, with one setting for padded and one for dynamic batches."""
    settings = {
        "padded": {**asdict(paper_setting()), **setting},
        "dynamic": {**asdict(paper_setting(padding="longest", task="mrpc")), **setting},
    }
    write_json(results / "bench" / f"{name}.json", {"schema": 1, "settings": settings, "cells": cells})


def measurement(setting: str, arm: str, speed: float | None, peak: float = 100.0) -> dict[str, Any]:
    status: dict[str, Any] = {"status": "complete", "steps": 50, "steps_per_second": speed, "peak_mib": peak}
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
    assert not any("padded, MiB, cpu" in name for name in three.frame.columns), (
        "a machine without a padded cell has no column"
    )
    assert cell(three, "published steps/s", arm="full") == "4.11"
    assert cell(three, "logs' batch", arm="full") == "16 / 32"
    ours, theirs = (cell(three, "true training MB", arm=arm) for arm in ("layer_regular", "full"))
    assert (ours, theirs) == ("3311 / 4959", "3192 / 4862"), "more than full fine-tuning at either batch size"
    assert cell(seven, "logs' batch", arm="lora_peft", task="rte") == "16"
    places = (
        "Padded to 128 tokens: gpu: RoBERTa-base; all tasks .* longest row: cpu: RoBERTa-base; scaled: 1 of 12 blocks;"
    )
    assert any(re.search(places, note) for note in three.notes)
    assert any("token lengths are not available for mnli, qnli, qqp" in note for note in seven.notes)
    assert cell(seven, "ours dynamic, steps/s, cpu (scaled)", arm="full", task="mrpc") == "2"
    assert cell(seven, "ours dynamic, steps/s, cpu (scaled)", arm="full", task="cola") == "missing"
    assert cell(seven, "ours padded, steps/s, gpu", arm="full", task="rte") == "9"
    assert cell(eight, "ours dynamic, MiB, cpu (scaled)", arm="full", task="mrpc") == "55"
    assert cell(eight, "published", arm="exact", task="mrpc") == "none"
    assert cell(seven, "published", arm="lora_peft", task="average") == "4.7 [its cells average 4.53]"
    assert cell(seven, "ours padded, steps/s, gpu", arm="full", task="average") == ""


def test_what_skips_padding_costs_by_task(results: Path) -> None:
    bench(results, "gpu", [measurement("padded", "layer_sparse_dense", 9.0)])
    _, seven, _, _ = speed.tables(context(results))
    of = {
        task: cell(seven, "ours padded, steps/s, gpu", arm="layer_sparse_dense", task=task) for task in ("cola", "rte")
    }
    assert of == {"cola": "9", "rte": "missing"}


def test_a_machines_whole_model_stands_before_its_cut_one(results: Path) -> None:
    bench(results, "cpu", [measurement("padded", "full", 9.0)], label="RoBERTa-base; scaled: 1 of 12 blocks")
    path = results / "bench" / "cpu.json"
    document = json.loads(path.read_text())
    document["settings"]["whole"] = {**document["settings"]["padded"], "label": "RoBERTa-base; all 12 blocks"}
    document["cells"] += [measurement("whole", "full", 0.8), measurement("dynamic", "full", 20.0)]
    write_json(path, document)
    _, seven, _, _ = speed.tables(context(results))
    assert cell(seven, "ours padded, steps/s, cpu", arm="full", task="rte") == "0.8"
    assert cell(seven, "ours dynamic, steps/s, cpu (scaled)", arm="full", task="mrpc") == "20"
    assert [name for name in seven.frame.columns if name.startswith("ours")] == [
        "ours padded, steps/s, cpu",
        "ours dynamic, steps/s, cpu (scaled)",
    ]


def test_a_setting_of_ones_own_replaces_none_of_the_paper(results: Path) -> None:
    own: list[dict[str, Any]] = [
        {"density": 0.5},
        {"length": 64},
        {"task": "mrpc"},
        {"batch": 32},
        {"mode": "compiled"},
    ]
    own.append({"blocks": 1, "label": "scaled: 1 of 12 blocks"})
    others = {f"own{number}": {**asdict(paper_setting()), **other} for number, other in enumerate(own)}
    # Before and after the planned setting, as neither the first nor the last match may count.
    settings = {**others, "planned": asdict(paper_setting()), **{f"{key} again": one for key, one in others.items()}}
    cells = [
        {**measurement(key, arm, speed), "repeat": repeat}
        for repeat in range(3)
        for key in settings
        for arm, speed in (("exact", 2.0 if key == "planned" else 9.0), ("full", 1.0))
    ]
    write_json(results / "bench" / "box.json", {"schema": 1, "settings": settings, "cells": cells})
    three, seven, _, every = speed.tables(context(results))
    assert cell(three, "ours padded, steps/s, box", arm="exact") == "2"
    assert cell(seven, "ours padded, steps/s, box", arm="exact", task="mrpc") == "2"
    assert machine_ratios(results, "exact", "full", "steps_per_second") == {"box, a CPU, 3 repeats": [2.0] * 3}
    assert {"roberta_base, density 0.5", "roberta_base, length 64", "roberta_base"} < set(every.frame["model"])


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
    (tmp_path / "paper.csv").write_text("table,model,method,task,batch,lr\n13,bert_base,full,cola,8,1\n")
    with pytest.raises(UserError, match=r"has wrong columns \(batch, batch_size\): it needs exactly table, model"):
        read_rows("paper", tmp_path)


def test_tables_13_to_15_take_a_study_from_its_summary(results: Path) -> None:
    best = {"value": 0.5123, "values": {"train.batch_size": 16, "train.lr": 2e-5}}
    of = {"metric": "accuracy", "objective": "heldout", "best": best, "trials": {"complete": 40, "pruned": 0}}
    labels = {"model": "bert_base", "method": "sparsegrad", "task": "cola"}
    write_json(results / "studies" / "s" / "summary.json", {**of, "study": "s", "labels": labels})
    write_json(results / "studies" / "mini" / "summary.json", {**of, "study": "mini"})
    trials = ["complete,0.5123,16,2e-05", "complete,0.5123,32,3e-05", "pruned,0.5123,32,4e-05", "complete,0.5,32,5e-05"]
    lines = ["state,value,train.batch_size,train.lr", *trials, ""]
    (results / "studies" / "mini" / "trials.csv").write_text("\n".join(lines))
    tables = {table.name: table for table in hyperparams.tables(context(results))}
    row = {"task": "cola", "study": "s"}
    assert cell(tables["table13"], "found here", **row) == "16 / 2.00e-05"
    assert cell(tables["table13"], "score", **row) == "0.5123"
    assert tables["table13"].coverage == (1, 8)
    assert cell(tables["table14"], "found here", task="cola") == "missing"
    assert list(tables["table13_mini"].frame["study"]) == ["mini"]
    assert cell(tables["table13_mini"], "as good", study="mini") == "32 / 3.00e-05"


def test_findings_have_data_or_are_left_out(results: Path) -> None:
    bench(results, "gpu", [measurement("padded", "exact", 6.0), measurement("padded", "layer_regular", 2.0)])
    frame = findings.table(context(results)).frame.set_index("question")["answer"]
    assert (
        frame["How fast are the engines on gpu (whole model; 1 process per engine)?"]
        == "exact: 3.00 times the steps/s of layer_regular"
    )
    assert (
        "Table 4, LoRA prints 83.7, its cells average 84.86" in frame["Which printed averages contradict their cells?"]
    )
    assert not any("energy" in question for question in frame.index)


def test_a_cell_of_the_page_leads_to_records_curves_environment_and_rerun(results: Path) -> None:
    log = {
        "losses": [{"step": 10, "loss": 0.9}, {"step": 20, "loss": 0.3}],
        "evaluations": [{"step": 20, "matthews_correlation": 0.9}],
    }
    hardware = {
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1},
        "git": {"commit": "0123456789", "dirty": True},
    }
    write(results, f"{FOLDER}/full42", record("full", "cola", 42, 0.8, **log, environment=hardware))
    of = context(results)
    text = page.write_page(of, [accuracy.per_task(of, 9)], {}).read_text()
    anchor = "table9--full-cola-paper"
    assert text.count(f'href="#{anchor}">82.00 ± 2.00</a>') == 1
    detail = text.split(f'id="{anchor}"')[1].split("</div>")[0]
    assert f'href="../runs/{FOLDER}/full42.json"' in detail
    assert "commit 0123456 with changes" in detail
    assert "training loss: 0.3 to 0.9, 20 steps" in detail
    assert "<polyline" in detail
    assert "<circle" in detail, "one evaluation is a point"
    assert "a processor, 2 cores, 1 threads" in detail
    assert "make reproduce-table9 ARGS=&#34;method=full task=cola seed=2023,3705,42&#34;<" in detail


def test_a_table_without_anything_of_ours_is_folded_away(results: Path) -> None:
    of = context(results)
    small = main_tables.block_tables(of, "evidence_paper")
    text = page.write_page(of, [accuracy.per_task(of, 4), accuracy.per_task(of, 9), architecture.table(of), *small], {})
    shown = text.read_text()
    assert '<h2 id="table1">' in shown
    assert '<h2 id="table9">' in shown
    folded = shown.split('<details class="bare" id="table4">')[1]
    assert 'On a small model: <a href="#evidence_paper">' in folded
    assert '<h2 id="evidence_paper">' in shown


def test_the_energy_of_figure2_is_printed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = {"log10": ["-1.0 0.0", "-2.0 -3.0"], "shape": [2, 2]}
    views = {
        name: {**maps, "top_1_percent": share}
        for name, share in (("untouched", 0.4), ("rotated", 0.7), ("authors", 0.2))
    }
    data = {"block": 1, "step": 5, "model": "minilm", "task": "sst2", "kinds": {"intermediate": views, "output": views}}
    write_json(results / "figures" / "figure2.json", data)
    assert report.main(["figure2", "--results-dir", str(results)]) == 0
    said = capsys.readouterr().out
    assert (
        "block 1, step 5, output: the largest 1 % holds unrotated 40.0 %, rotated (HOSVD) 70.0 %, authors' basis 20.0 %"
        in said
    )
    assert {path.name for path in (results / "figures").iterdir()} == {"figure2.json", "figure2.png", "figure2.pdf"}
