"""The table of quality and cost, its plot, and the energy table, from synthetic records and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments_report import cell, context, record, write

from experiments.bench.arms import ARMS
from experiments.report import command as report
from experiments.report import figures
from experiments.report.tables import quality
from experiments.report.tables.accuracy import AVERAGE, MINI_TASKS
from experiments.studies.captured import ARMS as CAPTURING
from experiments.studies.captured import capture, leading_energy
from sparsegrad import hosvd
from sparsegrad.files import write_json

SCORES = {"sparsegrad": (0.80, 0.82, 0.84), "lora": (0.70, 0.72, 0.74), "sparsegrad_fast": (0.78, 0.80, 0.82)}
SPEEDS = {"exact": 5.0, "lora_peft": 8.0, "fast": 10.0, "full": 6.0}


def losses(first: float, steps: int) -> list[dict[str, float]]:
    return [{"step": 10 * i, "loss": first / i} for i in range(1, steps + 1)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three methods with all tasks and seeds, chosen on held-out rows; a benchmark of four arms."""
    for method, values in SCORES.items():
        for task in MINI_TASKS:
            for seed, value in zip((42, 3705, 2023), values, strict=True):
                made = record(method, task, seed, value, losses=losses(1.0, 4 if method == "lora" else 2))
                made["config"]["protocol"]["name"] = "heldout"
                write(
                    tmp_path, f"mini/{method}{task}{seed}", {**made, "trainable": {"per_weight": {"a": 900, "b": 100}}}
                )
    bench(tmp_path, "box", SPEEDS)
    return tmp_path


def bench(results: Path, name: str, speeds: dict[str, float], **other: Any) -> None:
    setting = {**quality.SETTING, "batch": 16, "precision": "fp32", **other}
    cells = [
        {
            "setting": "s",
            "arm": arm,
            "repeat": repeat,
            "status": "complete",
            "peak_mib": 10 * speed,
            "steps_per_second": speed * (1.0 + drift),
        }
        for arm, speed in speeds.items()
        for repeat, drift in enumerate((-0.1, 0.0, 0.2))
    ]
    write_json(results / "bench" / f"{name}.json", {"schema": 1, "settings": {"s": setting}, "cells": cells})


def test_every_arm_is_in_the_benchmark() -> None:
    assert {arm for _, arm in quality.ARMS.values()} <= set(ARMS)


def test_scores_intervals_loss_speed_and_memory(results: Path) -> None:
    table = quality.table(context(results))
    of = {"method": "SparseGrad, engine fast (not exact)"}
    assert cell(table, "cola", **of) == "80.00 ± 2.00"
    assert cell(table, AVERAGE, **of) == "80.00 ± 2.00"
    assert (cell(table, "n", **of), cell(table, "trainable", **of)) == ("3", "1,000")
    low, high = (float(part) for part in cell(table, "minus LoRA", **of).split(" to "))
    assert low < 8 < high
    low, high = (float(part) for part in cell(table, "minus exact", **of).split(" to "))
    assert low < -2 < high
    assert (cell(table, "steps/s", **of), cell(table, "peak MiB", **of)) == ("10.00", "100")  # medians
    assert (cell(table, "over LoRA", **of), cell(table, "over LoRA ", **of)) == ("1.25", "1.25")  # within a repeat
    assert cell(table, "minus exact", method="SparseGrad, engine exact (default)") == ""
    assert "results/bench/box, batch 16, fp32" in table.notes[-1]


def test_losses_are_compared_over_the_steps_that_all_took(results: Path) -> None:
    per_task, table = quality.per_task(context(results)), quality.table(context(results))
    assert cell(per_task, "loss", method="LoRA, alpha = 1", task="cola") == "0.7500"  # 1 and 1/2, of 4
    assert cell(table, "loss", method="LoRA, alpha = 1") == "0.7500"


def test_what_is_missing_says_so(results: Path) -> None:
    (results / "runs" / "mini" / "sparsegrad_fastcola42.json").unlink()
    (results / "bench" / "box.json").unlink()
    table = quality.table(context(results))
    meprop = {"method": "MeProp"}
    assert {cell(table, name, **meprop) for name in ("cola", AVERAGE, "loss", "steps/s", "trainable")} == {"missing"}
    assert cell(table, "n", method="SparseGrad, engine fast (not exact)") == "2 of 3"
    assert "python -m experiments.bench --presets model" in table.notes[-1]
    assert quality.points(context(results)) == []
    assert quality.energy(context(results)).frame.iloc[0, 0] == "missing"


def test_the_speeds_are_one_machines_in_the_right_setting(results: Path) -> None:
    bench(results, "other", {"fast": 99.0})
    bench(results, "padded", dict.fromkeys(ARMS, 99.0), padding="max_length")
    machine, costs = quality.measured(results)
    assert machine.startswith("box")
    assert (costs["fast"].speed, costs["fast"].speed_ratio) == (10.0, 1.25)


def test_the_front_holds_what_nothing_beats(results: Path) -> None:
    points = {one["method"]: one["front"] for one in quality.points(context(results))}
    assert points == {"sparsegrad": True, "sparsegrad_fast": True, "lora": False}
    of = context(results)
    figure = figures.quality_speed(of)
    assert figure is not None
    figures.save(figure, results / "a.png")
    assert {one["method"] for one in json.loads((results / "figures" / "quality.json").read_text())["points"]} == set(
        points
    )
    assert report.main(["quality", "--results-dir", str(results)]) == 0
    assert (results / "tables" / "quality.md").is_file()


def test_what_an_engine_captures_is_what_it_trains() -> None:
    torch.manual_seed(0)
    G = torch.outer(torch.randn(60), torch.randn(40))
    shares = capture([G], hosvd([G]))
    assert set(shares) == set(CAPTURING)
    assert shares["exact, both sides"][0] > 0.999  # rank one: a single entry after rotation
    assert shares["block, proportional"][0] > 0.999
    assert shares["MeProp"][0] < shares["small side"][0]
    assert leading_energy(torch.ones(4, 5), 2, 5) == pytest.approx(0.5)
    assert leading_energy(torch.zeros(2, 2), 1, 1) == 0


def test_the_energy_table_has_first_last_and_mean(results: Path) -> None:
    rows = [
        {"step": step, "kind": kind, "arm": "MeProp", "blocks": [share, share]}
        for kind in ("intermediate", "output")
        for step, share in ((0, 0.2), (20, 0.4), (40, 0.9))
    ]
    write_json(results / "figures" / "energy.json", {"schema": 1, "rows": rows})
    table = quality.energy(context(results))
    found = [cell(table, f"output, {name}", arm="MeProp") for name in ("step 0", "step 40", "all")]
    assert found == ["0.200", "0.900", "0.500"]
