"""Scores that no longer count do not stay in files of an earlier report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.report.stale import remove_stale
from experiments.report.tables.base import Table


def test_files_of_a_plan_that_were_not_written_are_removed(tmp_path: Path) -> None:
    names = {
        "tables": [
            "evidence_paper.md", "evidence_paper_exact.csv", "evidence_basis_tasks.tex", "mine.md",
            "evidence_paper_mine.csv",
        ],
        "compare": ["compare.md", "compare.png", "compare_smollm2.png", "compare_smollm2.pdf"],
        "compare/forgetting": ["compare.json"],
    }  # fmt: skip
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).touch()
    frame = pd.DataFrame([{"method": "full"}])
    tables = [Table("evidence_paper", "A title", frame), Table("compare_smollm2", "Another", frame, folder="compare")]
    remove_stale(tmp_path, tables, [tmp_path / "compare" / "compare_smollm2.png"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "tables/evidence_paper.md", "tables/mine.md", "tables/evidence_paper_mine.csv", "compare/compare_smollm2.png",
        "compare/compare_smollm2.pdf", "compare/forgetting/compare.json",
    }  # fmt: skip


def test_a_folder_without_results_has_nothing_to_remove(tmp_path: Path) -> None:
    remove_stale(tmp_path, [], [])
    assert list(tmp_path.iterdir()) == []
