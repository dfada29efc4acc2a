"""Speed and memory from the benchmark beside the scores, and the energy table, from synthetic measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments_report import cell, context

from experiments.bench.arms import ARMS
from experiments.bench.presets import ACCURACY_SETTING
from experiments.report import command as report
from experiments.report.figure_data import read_figure_data
from experiments.report.tables import costs, energy
from experiments.report.tables.evidence_cells import BENCHED
from experiments.studies.captured import ARMS as CAPTURING
from experiments.studies.captured import capture, leading_energy
from sparsegrad import hosvd
from sparsegrad.errors import UserError
from sparsegrad.files import write_json


def bench(results: Path, name: str, speeds: dict[str, float], **other: Any) -> None:
    setting = {**ACCURACY_SETTING.as_json(), **other}
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
    assert set(BENCHED.values()) <= set(ARMS)


def test_the_speeds_are_one_machines_in_the_right_setting(tmp_path: Path) -> None:
    assert costs.measured(tmp_path) == ("", {})
    bench(tmp_path, "box", {"exact": 5.0, "lora_peft": 8.0, "fast": 10.0, "full": 6.0})
    bench(tmp_path, "other", {"fast": 99.0})
    for number, own in enumerate(({"padding": "max_length"}, {"density": 0.5}, {"length": 64}, {"precision": "bf16"})):
        bench(tmp_path, f"own{number}", dict.fromkeys(ARMS, 99.0), **own)
    machine, found = costs.measured(tmp_path)
    assert machine == "box, batch 16, fp32"
    assert found["fast"] == costs.Cost(speed=10.0, peak_mib=100.0), "medians over repeats"


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


def test_the_energy_table_has_first_last_and_mean(tmp_path: Path) -> None:
    assert energy.table(context(tmp_path)).frame.iloc[0, 0] == "missing"
    rows = [
        {"step": step, "kind": kind, "arm": "MeProp", "blocks": [share, share]}
        for kind in ("intermediate", "output")
        for step, share in ((0, 0.2), (20, 0.4), (40, 0.9))
    ]
    write_json(tmp_path / "figures" / "energy.json", {"schema": 1, "rows": rows})
    table = energy.table(context(tmp_path))
    found = [cell(table, f"output, {name}", arm="MeProp") for name in ("step 0", "step 40", "all")]
    assert found == ["0.200", "0.900", "0.500"]
    assert report.main(["quality", "--results-dir", str(tmp_path)]) == 0
    assert (tmp_path / "tables" / "quality_energy.md").is_file()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_energy_is_one_error_with_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "energy.json").write_text(content)
    with pytest.raises(UserError, match=r"energy\.json is damaged .*: make reproduce-quality measures it again"):
        energy.table(context(tmp_path))


@pytest.mark.parametrize("name", ["figure2", "figure3", "basis", "energy"])
@pytest.mark.parametrize("content", ["{}", "[]", '{"kinds": {}, "shares": [], "rows": []}'], ids=["{}", "[]", "empty"])
def test_data_of_a_figure_without_its_measurements_is_one_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=rf"{name}\.json is damaged \(no .*make reproduce-"):
        read_figure_data(tmp_path, name)
