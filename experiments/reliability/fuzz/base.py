"""What every reader under test is described by, and the kinds of damage that suit a kind of file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.reliability.fuzz import mutate

Change = Callable[[Path, random.Random], None]
"""Damages one file in place."""

# A change is drawn uniformly from its tuple: what is listed twice is drawn twice as often.
TEXT = (*mutate.ANY, mutate.bits_flipped, mutate.spliced)
LINES = (*TEXT, *mutate.JSON)
TENSOR_FILE = (*mutate.ANY, *[mutate.tensors_changed] * 3)


@dataclass(frozen=True)
class Reader:
    """One reader under test.

    Attributes:
        make: writes a set of good files into a folder.
        files: file name -> the changes that may damage it; each input damages one file.
        read: reads the folder; must return correct data or raise `UserError`.
        repair: runs after the damage and does what an attacker who knows the format would, such as updating a hash.
    """

    make: Callable[[Path], None]
    files: Mapping[str, tuple[Change, ...]]
    read: Callable[[Path], None]
    repair: Callable[[Path, random.Random], None] = lambda folder, draw: None
