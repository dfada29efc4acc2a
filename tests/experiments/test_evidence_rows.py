"""What the cells of a block rest on: the same validation rows, the same seeds, and the runs that its notes name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_cases import SEEDS, Cases, draw_predictions
from test_evidence_begun import RECORDS, keep_seeds, main_table
from test_experiments_report import cell, context
from test_report_gates import health, load

from experiments.report import command as report
from experiments.report.collect import collect_cells
from experiments.report.score_hours import points
from experiments.report.tables.main_tables import block_tables
from sparsegrad.files import read_json, write_json
from sparsegrad.runs.predictions import describe_arrays, predictions_path, read_predictions, write_predictions

DIFFERENCE = "minus LoRA, alpha = 2 rank"
PAPER = 'the table "All methods, the paper\'s regime, MiniLM"'


def change_arrays(cases: Cases, name: str, **arrays: Any) -> Path:
    """Replace arrays of a run's predictions; the run has the score of the new ones."""
    path = cases.results / RECORDS / f"{name}.json"
    record = read_json(path)
    found = {**read_predictions(path, record), **arrays}
    record["result"]["value"] = float((found["predicted"] == found["label"]).mean())
    write_json(path, {**record, "predictions": describe_arrays(found)})
    write_predictions(path, found)
    return path


@pytest.mark.parametrize("is_shorter", [True, False], ids=["fewer rows", "another label"])
def test_a_run_with_other_validation_rows_is_named_and_left_out(cases: Cases, is_shorter: bool) -> None:
    cases.healthy()
    path = cases.results / RECORDS / "sparsegrad-sst2-42.json"
    found = read_predictions(path, read_json(path))
    label = found["label"].copy()
    label[0] = 1 - label[0]
    other = {name: array[:-10] for name, array in found.items()} if is_shorter else {"label": label}
    change_arrays(cases, path.stem, **other)
    block = load(cases).blocks["evidence_paper"]
    assert set(block.of("sparsegrad", "sst2")) == {3705, 2023}
    assert block.apart == [
        "evidence_paper/sparsegrad-sst2-42.json: its validation rows are not those of 8 other runs on sst2: delete it; "
        "then make evidence BLOCK=2a DATA=<glue folder> makes it again. If the new one has the same rows as this, the "
        "data folder differs from that of the others"
    ]
    assert report.main(["evidence", "--results-dir", str(cases.results)]) == 0


def test_runs_of_an_earlier_search_have_no_vote_on_the_rows(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "sst2", ("full", "lora_tuned"), ())
    study = {"from": "search", "study": "evidence-minilm-sparsegrad-sst2"}
    for seed in SEEDS:
        path = cases.run("sparsegrad", "sst2", seed, 0.8, name=f"old{seed}", hparams={**study, "train.lr": 3e-4})
        arrays = read_predictions(path, read_json(path))
        change_arrays(cases, path.stem, **{name: array[:-10] for name, array in arrays.items()})
        if seed != 42:
            cases.run("sparsegrad", "sst2", seed, 0.86, hparams={**study, "train.lr": 1e-4})
    (cases.results / RECORDS / "sparsegrad-sst2-42.json").unlink()
    block = load(cases).blocks["evidence_paper"]
    assert {run.path.stem for run in block.of("sparsegrad", "sst2").values()} == {
        "sparsegrad-sst2-3705", "sparsegrad-sst2-2023",
    }  # fmt: skip
    (said,) = block.apart
    assert said.startswith("sparsegrad sst2: of an earlier search (rate 0.0003, now 0.0001): old")


def test_one_other_run_is_named_in_the_singular(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "sst2", ("full", "lora_tuned", "sparsegrad"), (42,))
    (cases.results / RECORDS / "lora_tuned-sst2-42.json").unlink()
    change_arrays(cases, "sparsegrad-sst2-42", label=np.roll(draw_predictions(0.85, 1)["label"], 1))
    assert "are not those of 1 other run on sst2: delete it" in load(cases).blocks["evidence_paper"].apart[0]


def test_labels_in_the_wider_type_of_an_earlier_version_are_the_same_rows(cases: Cases) -> None:
    cases.healthy()
    rows = np.linspace(0, 5, 300).astype(np.float32)  # not exact in float16
    for seed in SEEDS:
        for arm in ("full", "lora_tuned", "sparsegrad"):
            kind = np.float32 if (arm, seed) == ("sparsegrad", 42) else np.float16
            path = cases.run(arm, "sst2", seed, 0.8)
            arrays = {"predicted": rows.astype(kind), "label": rows.astype(kind)}
            record = read_json(path)
            record["result"] |= {"metric": "pearson", "value": 1.0}
            write_json(path, {**record, "predictions": describe_arrays(arrays)})
            write_predictions(path, arrays)
    assert set(load(cases).blocks["evidence_paper"].of("sparsegrad", "sst2")) == set(SEEDS)
    assert cell(main_table(cases), DIFFERENCE, method="SparseGrad exact")


@pytest.mark.parametrize("part", ["result", "value", "metric"])
def test_a_complete_record_without_its_score_is_listed(cases: Cases, part: str) -> None:
    cases.healthy()
    path = cases.results / RECORDS / "sparsegrad-sst2-42.json"
    record = read_json(path)
    del (record if part == "result" else record["result"])[part]
    write_json(path, record)
    store, apart = collect_cells(cases.results / "runs"), load(cases).blocks["evidence_paper"].apart
    if part == "metric":
        said = "left out, its score has no metric: make evidence BLOCK=2a DATA=<glue folder> makes it again"
        assert apart == [f"evidence_paper/{path.name}: {said}"]
    else:
        said = "not a readable record (it is complete without result.value)"
        assert store.skipped == [f"evidence_paper/{path.name}: {said}"]
    assert set(load(cases).blocks["evidence_paper"].of("sparsegrad", "sst2")) == {3705, 2023}


def test_a_run_without_its_predictions_names_the_command_of_its_block(cases: Cases) -> None:
    cases.healthy()
    path = cases.results / RECORDS / "sparsegrad-sst2-42.json"
    predictions_path(path).unlink()
    (line,) = load(cases).blocks["evidence_paper"].apart
    assert line.endswith("npz is missing: make evidence BLOCK=2a DATA=<glue folder> makes it again")
    assert "force" not in line


def test_the_average_of_tasks_with_different_seeds_is_that_of_the_differences(cases: Cases) -> None:
    seeds = {"sst2": (*SEEDS, 37, 7777), "mrpc": SEEDS}
    grid = {"task": "sst2,mrpc", "seed": "42,3705,2023,37,7777", "method": "full,lora_tuned,sparsegrad"}
    cases.plan(rules={"seeds": list(seeds["sst2"])}, grid=grid)
    for arm, accuracy, gain in (("full", 0.85, 0.0), ("lora_tuned", 0.8, 0.0), ("sparsegrad", 0.86, 0.05)):
        for task, of_task in seeds.items():
            for number, seed in enumerate(of_task):
                cases.run(arm, task, seed, accuracy + 0.004 * (number % 3 - 1) + gain * (number > 2))
    table = main_table(cases)
    averages = {arm: cell(table, "average", method=arm) for arm in ("SparseGrad exact", "LoRA, alpha = 2 rank")}
    assert all(one.endswith(" (3 to 5, 3 common)") for one in averages.values())
    own, other = (float(one.split()[0]) for one in averages.values())
    assert own - other == pytest.approx(float(cell(table, DIFFERENCE, method="SparseGrad exact")), abs=0.011)
    assert any(note.startswith("Averages of tasks with different seeds") for note in table.notes)
    shown = {point.arm: point.score for point in points(context(cases.results), "evidence_paper")}
    assert shown["sparsegrad"] == pytest.approx(own, abs=0.0051)


def test_complete_cells_say_nothing_of_different_seeds(cases: Cases) -> None:
    cases.healthy()
    table = main_table(cases)
    assert cell(table, "average", method="SparseGrad exact") == "86.00 ± 0.33 (3)"
    assert not any("different seeds" in note for note in table.notes)


def test_an_average_without_a_common_seed_has_no_spread(cases: Cases) -> None:
    cases.healthy()
    keep_seeds(cases, "sst2", ("sparsegrad",), (42,))
    keep_seeds(cases, "mrpc", ("sparsegrad",), (2023,))
    assert cell(main_table(cases), "average", method="SparseGrad exact").endswith(" (1, 0 common)")
    assert cell(main_table(cases), "IQM", method="SparseGrad exact") == "missing"


def test_floors_and_the_block_that_gave_the_gates_are_named(cases: Cases) -> None:
    cases.healthy()
    grid = {"task": "sst2", "seed": "42,3705,2023", "method": "lora_tuned,random_mask"}
    rules = {"gate_experiment": "evidence_paper", "regime": "mlp_only", "floors": ["random_mask"]}
    cases.plan("evidence_mlp_only", rules, grid=grid)
    for seed in SEEDS:
        for arm, accuracy in (("lora_tuned", 0.8), ("random_mask", 0.7)):
            cases.run(arm, "sst2", seed, accuracy, folder="evidence_mlp_only")
    assert health(cases, "sst2", "evidence_mlp_only").gate_folder == "evidence_paper"
    assert health(cases, "sst2").gate_folder == ""
    for table in block_tables(context(cases.results), "evidence_mlp_only"):
        notes = "\n".join(table.notes)
        assert f"sst2: full fine-tuning 85.00 in {PAPER}, gate 60; 0 of 3 runs (floors not counted) still" in notes
        said = f"Gates and h to target: by the runs of full fine-tuning in {PAPER}, where everything trains."
        assert said in notes
        assert "Floors, to read the other scores by: random mask." in notes
    assert "floors" not in "\n".join(main_table(cases).notes).lower()


def test_the_table_per_task_describes_its_own_cells(cases: Cases) -> None:
    cases.healthy()
    main, tasks = block_tables(context(cases.results), "evidence_paper")
    notes = "\n".join(tasks.notes)
    assert "Difference: on the task of the row, paired by seed" in notes
    assert "of the average" not in notes
    assert "IQM" not in notes
    assert "Difference: of the average over comparable tasks, paired by seed" in "\n".join(main.notes)


def test_a_block_without_a_reference_describes_no_differences(cases: Cases) -> None:
    grid = {"task": "sst2", "seed": "42", "method": "full", "train.lr": "1e-4"}
    cases.plan("evidence_gates", {"min_seeds": 1, "seeds": [42]}, grid=grid)
    cases.run("full", "sst2", 42, 0.7, folder="evidence_gates")
    for table in block_tables(context(cases.results), "evidence_gates"):
        assert not any(note.startswith("Difference") for note in table.notes)
