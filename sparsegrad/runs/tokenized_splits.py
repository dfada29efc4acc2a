"""The tokenized rows of one run: what trains, what chooses the checkpoint, what is reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets

from sparsegrad.distributed import world_size
from sparsegrad.errors import UserError
from sparsegrad.runs.config import RunConfig
from sparsegrad.tasks.base import Splits

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenSets:
    """Tokenized rows: what trains, what chooses the checkpoint, what is reported (None: the same); and their counts."""

    train: datasets.Dataset
    choose: datasets.Dataset
    report: datasets.Dataset | None
    counts: dict[str, Any] = field(default_factory=dict)


def token_sets(config: RunConfig, splits: Splits, tokenizer: Any) -> TokenSets:
    """Tokenize the rows that train, choose the checkpoint and are reported under the run's protocol.

    Raises:
        UserError: when packing leaves too few rows for one batch of all processes.
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
    if len(sets.train) < config.train.batch_size * world_size():  # conversations are packed: fewer rows than before
        raise UserError(
            f"{describe_batch(config)} is not allowed: {config.task.name} fills {len(sets.train)} "
            "windows; give more conversations, a shorter data.max_length or a smaller batch"
        )
    return sets


def describe_batch(config: RunConfig) -> str:
    """The setting of the batch, with the number of processes that each have one."""
    processes = f" with {world_size()} processes" if world_size() > 1 else ""
    return f"train.batch_size={config.train.batch_size}{processes}"


def log_counts(*counts: Mapping[str, Any]) -> None:
    """Log the counts of the data."""
    for found in counts:
        log.info("data: %s", ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found.items()))
