"""Which of several processes this is, by what a launcher set, and what torch reads of its environment."""

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


# Products that each of torch's two caches for bfloat16 on a CPU (oneDNN's and ideep's) keeps, one for every shape.
# Batches of many lengths meet hundreds of shapes: with 1024, the default of both, one linear of 384 x 1536 held 670 MiB
# after 400 lengths, with 64 it held 130 MiB, and runs were as fast (1.93 and 1.95 steps/s).
KEPT_PRODUCTS = 64


def cap_product_caches() -> None:
    """Keep memory flat over hours of batches of many lengths; to be called before the first product.

    What the user set in the environment stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_PRODUCTS))
