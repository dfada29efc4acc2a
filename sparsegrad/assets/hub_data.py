"""Data sets of the Hugging Face hub, read from the parquet files of one commit.

`datasets.load_dataset` has a cache of its own, which `hf download` does not fill, and asks the hub several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow  # type: ignore[import-untyped]
from datasets.table import InMemoryTable
from pyarrow import parquet

from sparsegrad.assets.hub import fetch_dataset
from sparsegrad.errors import UserError, first_line


def read_dataset(name: str, patterns: Mapping[str, str], otherwise: str) -> dict[str, datasets.Dataset]:
    """The parts of a data set, in memory.

    Args:
        name: of the repository.
        patterns: part -> pattern of its parquet files, such as `cola/train-*.parquet`.
        otherwise: how to do without the hub, for error messages.

    Raises:
        UserError: when a file can be had neither from the hub nor from the cache, or cannot be read.
    """
    folder, files = fetch_dataset(name, patterns.values(), otherwise)
    found = {}
    for part, pattern in patterns.items():
        own = sorted(folder / file for file in files if Path(file).match(pattern))
        try:
            # The shards are numbered. Types of columns, such as label names, are in the metadata of the schema.
            table = pyarrow.concat_tables([parquet.read_table(path) for path in own])
            found[part] = datasets.Dataset(InMemoryTable(table))
        except (OSError, ValueError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"data set {name} cannot be read ({own[0]}: {first_line(error)}): {otherwise}") from None
    return found
