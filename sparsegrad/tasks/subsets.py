"""Subsets of a data set: the same rows in every run, on every machine."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import numpy as np

from sparsegrad.errors import UserError

# Every subset and held-out part uses this one seed, so that runs with different seeds see the same rows.
SPLIT_SEED = 20240507
HELDOUT = 0.1  # share of the training rows


def split_heldout(train: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows for protocol `heldout`: the same rows in every run, each part in the order of the file.

    Args:
        train: the training rows, of which a tenth is held out.

    Returns:
        (train, held out).

    Raises:
        UserError: if one of the parts would be empty.
    """
    count = round(len(train) * HELDOUT)
    if not count:
        fewest = next(number for number in itertools.count(1) if round(number * HELDOUT))
        raise UserError(
            f"{len(train)} training rows cannot give a held-out share of {HELDOUT:g}: at least {fewest} rows are "
            "needed; raise data.max_train, or give more data"
        )
    order = _shuffle_rows(len(train))
    # Sorted: each part keeps the order of the file.
    return train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))


def subset(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """Return `count` rows after a fixed shuffle; None, or more than exist: all, in their order."""
    return rows if count is None or count >= len(rows) else rows.select(_shuffle_rows(len(rows))[:count])


def _shuffle_rows(count: int) -> Any:
    # NumPy guarantees that the stream of RandomState never changes: the same rows on every machine and version.
    return np.random.RandomState(SPLIT_SEED).permutation(count)
