"""The measurements of figures 2 and 3 and the basis study, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import TINY

from experiments.report import figures
from experiments.report.collect import Store
from experiments.report.tables import basis as basis_table
from experiments.report.tables.base import Context
from experiments.studies import gradients as measure
from experiments.studies.probe import top_energy, variants
from sparsegrad import hosvd


@pytest.fixture
def made(glue: Path, tmp_path: Path) -> Any:
    """`made(what, ...)`: the measured JSON of a tiny model."""

    def run(what: str, *arguments: str) -> dict[str, Any]:
        small = [*TINY, "train.batch_size=4", f"results_dir={tmp_path}"]
        assert measure.main([what, "--data", str(glue), "--block", "1", *arguments, *small]) == 0
        return dict(json.loads((tmp_path / "figures" / f"{what}.json").read_text()))

    return run


def test_energy_is_a_share_that_no_rotation_changes_in_sum() -> None:
    G = torch.zeros(10, 10)
    G[0, 0], G[1, 1] = 3.0, 4.0
    assert top_energy(G, 0.01) == pytest.approx(16 / 25)
    assert top_energy(G, 1.0) == pytest.approx(1.0)
    assert top_energy(torch.zeros(3, 3), 0.5) == 0.0


def test_every_variant_is_orthogonal_and_hosvd_concentrates_what_random_spreads() -> None:
    torch.manual_seed(0)
    rank_one = [torch.outer(torch.randn(30), torch.randn(20)) for _ in range(1)]
    named = variants(hosvd(rank_one))
    for one in named.values():
        for matrix in filter(lambda side: side is not None, (one.in_basis, one.out_basis)):
            torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(matrix)), atol=1e-5, rtol=0)
    energy = {name: top_energy(one.rotate(rank_one[0]), 1 / 600) for name, one in named.items()}
    assert energy["both"] > 0.999
    assert max(energy["none"], energy["random"], energy["authors"]) < 0.5
    assert energy["none"] < min(energy["in-side"], energy["out-side"])


def test_stripes_are_padding(made: Any, tmp_path: Path) -> None:
    found = made("figure3", "--steps", "1")
    assert {(row["step"], row["pad"]) for row in found["shares"]} == {
        (step, pad) for step in (0, 1) for pad in ("max_length", "longest")
    }
    for row in found["shares"]:
        assert all(share <= row["real_tokens"] + 1e-4 for share in row["nonzero"]["intermediate"])
    padded = found["pictures"]["max_length"]["intermediate"]
    assert padded["tokens"] == 4 * 128
    assert padded["row_share"].count(0.0) > 400
    assert figures.figure3(Context(tmp_path, Store(), "mini")) is not None


def test_heat_maps_and_energies(made: Any, tmp_path: Path) -> None:
    found = made("figure2", "--step", "1")
    view = found["kinds"]["output"]["rotated"]
    assert (found["block"], found["step"], view["shape"]) == (1, 1, [32, 64])
    assert max(float(value) for row in view["log10"] for value in row.split()) == 0.0
    energies = made("basis", "--steps", "1")
    assert len(energies["rows"]) == 2 * 2 * 6 * 3
    both = basis_table.kept_energy(energies, "both", "intermediate")
    assert list(both) == [0, 1]
    assert all(0 < value <= 1 for value in both.values())
    context = Context(tmp_path, Store(), "mini")
    drawn = figures.save(figures.figure2(context), tmp_path / "a.png").read_bytes()  # type: ignore[arg-type]
    assert figures.save(figures.figure2(context), tmp_path / "b.png").read_bytes() == drawn  # type: ignore[arg-type]
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert figures.basis_study(context) is not None


def test_a_block_that_is_not_there_is_one_line(glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["figure2", "--data", str(glue), "--block", "2", *TINY, "train.batch_size=4", f"results_dir={tmp_path}"]
    assert measure.main(arguments) == 2
    assert "block=2 is not allowed: give a whole number from 0 to 1" in capsys.readouterr().err
