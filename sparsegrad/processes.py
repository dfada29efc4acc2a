"""Which of several processes this is, by what `torchrun` or `accelerate launch` set; needs no torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together, by what the launcher set; known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes records and prints."""
    return rank() == 0
