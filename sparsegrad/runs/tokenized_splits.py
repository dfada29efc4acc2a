"""The token sets of one run, and the checks of their sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from sparsegrad.errors import UserError
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.trainer_setup import TokenSets
from sparsegrad.tasks.base import Splits

log = logging.getLogger(__name__)


def token_sets(config: RunConfig, splits: Splits, tokenizer: Any) -> TokenSets:
    """What trains, what chooses and what is reported under the run's protocol, as tokens.

    Raises:
        UserError: when packing leaves too few rows for one batch.
    """
    counts: dict[str, Any] = {}

    def tokens(rows: Any, part: str) -> Any:
        found, seen = config.task.tokens(rows, tokenizer, config.data)
        counts.update({f"{part}_{name}": count for name, count in seen.items()})
        return found

    if config.protocol.select == "validation":
        train, choose, report = splits.train, splits.validation, None
    else:
        (train, choose), report = config.task.heldout(splits.train), splits.validation
    sets = TokenSets(
        train=tokens(train, "train"),
        choose=tokens(choose, "validation" if report is None else "heldout"),
        report=None if report is None else tokens(report, "validation"),
        counts=counts,
    )
    if len(sets.train) < config.train.batch_size:  # conversations are packed: fewer rows than before
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not allowed: {config.task.name} fills {len(sets.train)} "
            "windows; give more conversations, a shorter data.max_length or a smaller batch"
        )
    return sets


def check_sizes(config: RunConfig, splits: Splits) -> None:
    """A split must fill one batch: less is a mistake in the data or in `data.max_train`."""
    share = 0.9 if config.protocol.select == "heldout" else 1.0
    rows, batch = math.floor(len(splits.train) * share), config.train.batch_size
    if rows < batch:
        raise UserError(
            f"train.batch_size={batch} is not allowed: {config.task.name} has {rows} training rows; "
            "give more rows (data.max_train) or a smaller batch"
        )
    if len(splits.validation) < 2:
        raise UserError(f"{config.task.name} has {len(splits.validation)} validation rows: give at least 2")


def log_counts(*counts: Mapping[str, Any]) -> None:
    """Show what the data holds."""
    for found in counts:
        log.info("data: %s", ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found.items()))
