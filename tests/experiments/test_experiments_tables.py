"""Single tables compared with known values: printed numbers, logs, counts, ablation, speed, LLaMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_experiments_report import AUTHORS, FOLDER, cell, context, fill, record, write

from experiments import published
from experiments.bench.presets import paper_setting
from experiments.mtbench.scores import ModelScores
from experiments.report.stats import summarise, welch_interval
from experiments.report.tables import ablation, accuracy, architecture, basis, calibration, correspondence, llama, speed
from experiments.report.tables.base import MINI_MARK
from experiments.report.tables.grades import grade
from sparsegrad.errors import UserError
from sparsegrad.files import write_json


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with three seeds of two methods on one task of Table 9."""
    return fill(tmp_path)


def test_a_wrong_column_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "published.csv").write_text("table,row,column,score,std\n4,LoRA,AVG,83.7,\n")
    with pytest.raises(UserError, match=r"has wrong columns \(score, value\): it needs exactly table, row, column"):
        published.cells(4, tmp_path)


def test_printed_averages_that_their_cells_contradict_are_marked() -> None:
    assert published.contradicts(4, "LoRA") == " [its cells average 84.86]"
    assert published.contradicts(9, "MeProp") == " [its cells average 81.47]"
    assert published.contradicts(4, "Regular FT") == ""  # 85.6 and 85.69: rounding explains it
    assert published.contradicts(7, "Regular FT") == ""  # 4.11 and 4.075 of cells with one digit
    assert published.contradicts(8, "Regular FT") == " [its cells average 1346.12]"
    assert published.contradicts(8, "SparseGrad, Regular") == ""
    assert "0.8% remained 99.0, 1% remained 94.8" in ablation.implied(12)  # of the SST-2 column, which is not printed


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
        write(results, f"{FOLDER}/c{seed}", record("meprop", "cola", seed, value))
    for seed, value in ((42, 279 / 408), (3705, 0.70)):
        write(results, f"{FOLDER}/m{seed}", record("meprop", "mrpc", seed, value))
    table = accuracy.per_task(context(results), 9)
    assert cell(table, "ours", method="meprop", task="cola") == "1.33 ± 2.31 (2 const.)"
    assert cell(table, "ours", method="meprop", task="mrpc").endswith(" (1 const.)")
    assert "const" not in cell(table, "ours", method="full", task="cola")
    assert accuracy.COLLAPSED in table.notes
    assert accuracy.COLLAPSED not in accuracy.per_task(context(results), 10).notes


OTHERS: dict[str, dict[str, Any]] = {  # departure -> changes of a record's configuration
    "protocol.max_steps=3": {"protocol": {"max_steps": 3}},
    "seed=7": {"seed": 7},
    "model.name=minilm": {"model": {"name": "minilm"}},
    "method.rank=2": {"method": {"name": "lora", "rank": 2}},
    "train.batch_size=2 by hand": {"train": {"batch_size": 2}},
}


def test_a_record_unlike_its_experiment_is_not_ours(results: Path) -> None:
    """Such as that of a trial with three steps, which would be shown beside the published cell."""
    before = accuracy.per_task(context(results), 9)
    for number, (said, change) in enumerate(OTHERS.items()):
        made = record("full", "rte", 42, 0.5 + number / 10)
        for name, value in change.items():
            made["config"][name] = {**made["config"][name], **value} if isinstance(value, dict) else value
        made["hparams"] = {key: value for key, value in AUTHORS.items() if not said.startswith(key)}
        write(results, f"{FOLDER}/other{number}", made)
    of = context(results)
    table = accuracy.per_task(of, 9)
    assert table.frame.equals(before.frame)
    assert table.records == before.records
    notes = [note for note in table.notes if note.startswith("Not counted")]
    where = f"Not counted: {FOLDER}/other"
    assert notes == [f"{where}{i}.json: not as experiment=table9 says: {said}." for i, said in enumerate(OTHERS)]
    assert not list(of.store.disagreements())


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


def test_the_ablation_counts_what_is_kept_and_sees_the_copied_row(results: Path) -> None:
    for seed in (42, 3705):
        for task in published.TASKS.values():
            made = record("sparsegrad", task, seed, 0.5, keep=22000)
            write(results, f"ablation_bert_base/{task}{seed}", made)
    table = ablation.table(context(results), 11)
    assert cell(table, "ours", kept="22,000", task="average") == "50.00 ± 0.00"
    assert cell(table, "share", kept="22,000", task="average") == "0.93 %"
    assert len(table.records["22,000 cola paper"]) == 2
    assert [(round(one.share, 2), one.value.mean) for one in ablation.curve(context(results), 11)] == [(0.93, 50.0)]
    assert any("equals the SparseGrad row of Table 9 in all 7 cells" in note for note in table.notes)


def test_speed_takes_medians_and_ratios_within_a_setting(results: Path) -> None:
    setting = paper_setting(task="mrpc", padding="longest").as_json()
    cells = [("full", 0, 2.0, 100.0), ("full", 1, 4.0, 100.0), ("full", 2, 3.0, 100.0), ("exact", 1, 6.0, 50.0)]
    rows = [
        {"setting": "s", "arm": arm, "repeat": i, "status": "complete", "steps": 9}
        | {"steps_per_second": speed, "peak_mib": peak}
        for arm, i, speed, peak in cells
    ]
    failed = {**rows[0], "arm": "fast", "status": "failed", "reason": "no memory"}
    settings = {"s": setting, "other": {**setting, "rest": "frozen"}}
    write_json(results / "bench" / "cpu.json", {"schema": 1, "settings": settings, "cells": [*rows, failed]})
    (results / "bench" / "torn.json").write_text("{")
    table = next(one for one in speed.tables(context(results)) if one.name == "table3_measured")
    assert list(table.frame["arm"]) == ["full", "exact", "fast"]
    assert cell(table, "steps/s", arm="fast") == "failed: no memory"
    assert (cell(table, "n", arm="full"), cell(table, "n", arm="fast")) == ("3", "0")
    assert cell(table, "steps/s", arm="exact") == "6.000"
    assert (cell(table, "of full", arm="exact"), cell(table, "of full ", arm="exact")) == (
        "1.50",
        "0.50",
    )  # of its repeat


def test_section8_finds_what_the_printed_megabytes_count() -> None:
    for one in calibration.PRINTED:
        numbers = calibration.arithmetic(one)
        closest = min(numbers, key=lambda name: abs(numbers[name] - calibration.in_mb(one.memory)))
        assert closest == "gradients of 1 weight, 30 steps"
        assert numbers[closest] == pytest.approx(calibration.in_mb(one.memory), rel=0.05)


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
        of = record("lora", "oasst1", seed, 0.0, model="minilm")
        write(results, f"table6_mini/{seed}", {**of, "result": {"metric": "nll", "value": loss}})
    table = llama.table(context(results))
    assert cell(table, "ours, loss", model=f"minilm ({MINI_MARK})", method="lora") == "1.300 ± 0.071"
    assert cell(table, "published loss", model="llama2_7b", method="lora") == "1.249 ± 0.05"


def test_table6_has_no_rows_of_sweeps_and_other_plans(results: Path) -> None:
    loss = {"result": {"metric": "nll", "value": 1.0}}
    for folder in ("evidence_smollm2", "evidence-smollm2-lora-oasst1", "table6_mini"):
        write(results, f"{folder}/a", {**record("lora", "oasst1", 42, 0.0, model="smollm2"), **loss})
    assert set(llama.table(context(results)).frame["experiment"]) == {"table6", "table6_mini"}


def test_runs_of_llama_fill_the_published_rows_of_table6(results: Path) -> None:
    """A seed with two records that disagree is not used, and the authors' variant has rows of its own."""
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
    of = record("sparsegrad", "oasst1", 42, 0.0, model="minilm")
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
    """22 % is up, down and gate of 11 blocks, and 0.5 % is LoRA on all blocks: the authors' code, not the text."""
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


def test_printed_trainable_parameters_are_shown_with_the_one_that_the_log_contradicts(tmp_path: Path) -> None:
    notes = {number: " ".join(accuracy.per_task(context(tmp_path), number).notes) for number in (4, 9, 10)}
    assert "LoRA 168 mln / 0.05 mln" in notes[4]
    assert "contradicts the authors' own log: 156,492,802" in notes[4]
    assert "LoRA 53 mln / 0.03 mln" in notes[9]
    assert "own log" not in notes[9] + notes[10]
