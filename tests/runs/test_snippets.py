"""Movie snippets: polarity and rating, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tasks import make

from sparsegrad.errors import UserError
from sparsegrad.tasks import DataConfig
from sparsegrad.tasks.snippets import FILE_NAME


def snippets_file(folder: Path, *extra: str) -> DataConfig:
    ratings = [1.5, -0.25, 0.0, 3.9]
    rows = [f"{i}\t{ratings[i % 4]}\tclich\xe9 number {i}" for i in range(200)]
    (folder / FILE_NAME).write_bytes("\r\n".join([*rows, *extra]).encode())
    return DataConfig(dir=str(folder))


def test_snippets_polarity_and_rating(tmp_path: Path) -> None:
    data = snippets_file(tmp_path, "200\t2.5\tclich\xe9 number 5")
    polarity, rating = make("snippets").load(data), make("snippets_rating").load(data)
    assert (len(polarity.train) + len(polarity.validation), len(rating.train) + len(rating.validation)) == (151, 201)
    assert polarity.train[0]["label"] == 1
    assert set(polarity.validation["sentence"]) <= set(rating.validation["sentence"])
    assert not set(rating.validation["sentence"]) & set(rating.train["sentence"])
    assert 8 <= len(rating.validation) <= 35
    assert not any(text.endswith("\r") for text in rating.train["sentence"])


@pytest.mark.parametrize("line", ["200\t4.5\ttoo much", "200\tnan\tnone", "200\t1.0", "200\tgood\tword", "200\t1.0\t "])
def test_a_malformed_snippet_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=rf"{FILE_NAME} line 201: "):
        make("snippets").load(snippets_file(tmp_path, line))


def test_a_missing_snippets_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=FILE_NAME):
        make("snippets").load(DataConfig(dir=str(tmp_path)))


def test_a_file_without_a_row_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("")
    with pytest.raises(UserError, match=rf"train split of data\.dir={tmp_path} has no rows"):
        make("snippets").load(DataConfig(dir=str(tmp_path)))
