"""The key of a run: a hash of all that determines its result. Keys of committed records must never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad.hashing import SHORT, json_sha256

# What decides where things go or how they are watched, but not the result.
_OUTSIDE_KEY = (
    "name", "results_dir", "work_dir", "force", "resume", "save_model", "save_adapter", "adapter_rank", "tracker",
)  # fmt: skip
_OUTSIDE_KEY_NESTED = (("data", "dir"), ("train", "device"), ("train", "eval_batch_size"))
# Settings that came after the first records, with the value that means "as before": left out of the key there, so
# that older records keep theirs.
LATER: dict[tuple[str, str], Any] = {
    ("method", "sides"): "both",
    ("method", "moments"): "dense",
    ("method", "release_gradients"): False,
    ("method", "drop_padding"): False,
    ("method", "save_dtype"): None,
    ("method", "authors_init"): False,
    ("method", "clipped_calibration"): False,
    ("method", "rotation_order"): "auto",  # the optimizer rotated before: equal up to rounding
    ("method", "rotation_dtype"): None,
    ("method", "error_feedback"): False,  # an option that was tried and dropped; some records have it
    ("method", "static"): False,
    ("model", "revision"): None,
    ("model", "keep_head"): False,
    ("model", "trust_remote_code"): False,
    ("task", "drop_last_question"): False,
    ("train", "schedule"): "constant",
    ("train", "warmup_steps"): 0,
    ("train", "warmup_ratio"): 0.0,
    ("train", "rest_lr"): None,
    ("model", "pooling"): None,
    ("train", "gradient_checkpointing"): False,
    ("train", "parallel"): "ddp",
    ("protocol", "eval_at_start"): False,
    ("protocol", "patience_from"): 0,
    ("protocol", "watch_validation"): False,
}
# Values that were renamed: (group, name) -> today's value -> the earlier one, which keys are made of.
_EARLIER: dict[tuple[str, str], dict[Any, Any]] = {("method", "engine"): {"exact": "merged"}}


def config_key(resolved: Mapping[str, Any]) -> str:
    """The key of a resolved configuration; see `RunConfig.key`."""
    return json_sha256(determining(resolved))[:SHORT]


def determining(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that determines the result."""
    kept = {name: dict(node) if isinstance(node, Mapping) else node for name, node in resolved.items()}
    for name in _OUTSIDE_KEY:
        kept.pop(name, None)
    for group, name in _OUTSIDE_KEY_NESTED:
        kept.get(group, {}).pop(name, None)
    for (group, name), before in LATER.items():
        if kept.get(group, {}).get(name, before) == before:
            kept.get(group, {}).pop(name, None)
    for (group, name), values in _EARLIER.items():
        if name in kept.get(group, {}):
            kept[group][name] = values.get(kept[group][name], kept[group][name])
    return kept


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {dotted key: value}."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
