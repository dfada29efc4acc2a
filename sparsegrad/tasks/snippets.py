"""Sentiment of movie review snippets: real labelled data that comes from a package index, without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsegrad.assets.download import asset_path
from sparsegrad.errors import UserError
from sparsegrad.hashing import text_sha256
from sparsegrad.tasks.base import DataConfig, Splits, Task, make_dataset
from sparsegrad.tasks.glue_files import lines

FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
_SCALE = 4.0  # the crowd rated from -4 to 4
_VALIDATION_SHARE = 10  # one text in ten is validation


@dataclass(frozen=True, kw_only=True)
class Snippets(Task):
    """Polarity (labels [negative, positive]; ratings of exactly 0 are left out) or, without labels, the rating itself.

    The source has no split of its own. A text whose sha256 is divisible by ten is in the validation split: the same
    rows on every machine, and the few texts that occur twice are never in both splits.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) not in (0, 2) or len(self.columns) != 1:
            raise UserError(
                f"task.labels={list(self.labels)}, task.columns={list(self.columns)}: {self.name} has one text column, "
                "and the labels [negative, positive] or none"
            )

    def _read(self, data: DataConfig) -> Splits:
        train: list[tuple[str, float]] = []
        validation: list[tuple[str, float]] = []
        for text, rating in _read_ratings(_find_file(data.dir)):
            if self.is_regression or rating != 0:
                (validation if in_validation(text) else train).append((text, rating))
        return Splits(*(make_dataset(self, self._make_columns(rows)) for rows in (train, validation)))

    def _make_columns(self, rows: list[tuple[str, float]]) -> dict[str, list[str] | list[float] | list[int]]:
        ratings = [rating for _, rating in rows]
        labels = ratings if self.is_regression else [int(rating > 0) for rating in ratings]
        return {self.columns[0]: [text for text, _ in rows], "label": labels}


def in_validation(text: str) -> bool:
    """Whether a snippet belongs to the validation split."""
    return int(text_sha256(text), 16) % _VALIDATION_SHARE == 0


def _find_file(folder: str | None) -> Path:
    path = (asset_path("snippets") if folder is None else Path(folder).expanduser()) / FILE_NAME
    if not path.is_file():
        raise UserError(f"data.dir={folder}: {path} does not exist; put it there, or use the asset with data.dir=null")
    return path


def _read_ratings(path: Path) -> Iterator[tuple[str, float]]:
    """Yield (text, rating from -4 to 4) of each line `id<TAB>rating<TAB>text`.

    Raises:
        UserError: with the number of a line of another form.
    """
    for number, line in lines(path):
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 3 or not fields[2].strip():
            raise UserError(f"{path} line {number}: give id, rating and text, separated by tabs")
        yield fields[2], _parse_rating(path, number, fields[1])


def _parse_rating(path: Path, number: int, text: str) -> float:
    try:
        rating = float(text)
    except ValueError:
        rating = float("nan")
    if not -_SCALE <= rating <= _SCALE:  # false for NaN too
        raise UserError(
            f"{path} line {number}: rating {text!r} is not allowed: give a number from {-_SCALE:g} to {_SCALE:g}"
        )
    return rating
