"""The settings that a mistyped or foreign name probably stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from omegaconf import DictConfig

from sparsegrad.errors import closest

# Names that users know from transformers and peft; they are suggested, not accepted.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "bs": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "num_train_epochs": "protocol.epochs",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "r": "method.rank",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "dataset": "task",
    "optimizer": "method",
    "output_dir": "results_dir",
}


def find_key(key: str, composed: DictConfig, others: Iterable[str]) -> str | None:
    """The nearest key for one that does not exist; None where nothing is near.

    Args:
        key: what the user wrote.
        composed: the configuration.
        others: names that are not in it, of groups and aliases.
    """
    paths = list_paths(composed)
    nested = [path for path in paths if path.count(".") == 1]
    last = re.split(r"[./]", key)[-1]
    same = [path for path in nested if path.endswith(f".{last}")]
    if "." in key:
        return closest(key, same) or closest(key, nested)
    if last in _ELSEWHERE or same:
        return _ELSEWHERE.get(last) or same[0]
    ends = {path.rpartition(".")[2]: path for path in reversed(nested)}
    found = closest(key, [*others, *(path for path in paths if "." not in path)])
    return found or ends.get(closest(last, ends) or "")


def find_exact(name: str, composed: DictConfig, others: Sequence[str]) -> str | None:
    """The key, or the only one that ends so, or the one that another library calls so; None if there is none."""
    paths = list_paths(composed)
    if name in paths or name in others:
        return name
    ends = [path for path in paths if path.rpartition(".")[2] == name]
    if len(ends) == 1:
        return ends[0]
    meant = _ELSEWHERE.get(name)
    return meant if meant in paths or meant in others else None


def list_paths(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all keys."""
    paths: list[str] = []
    for name in node:
        paths.append(prefix + str(name))
        child = node._get_node(name)  # not the value: an interpolation might fail
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            paths += list_paths(child, f"{prefix}{name!s}.")
    return paths


def describe_unknown(owner: str, where: str, name: str, fields: Sequence[str]) -> str:
    """What an error says about a field that does not exist: the nearest one, or all there are."""
    near = _ELSEWHERE.get(name, "").removeprefix(f"{where}.")
    near = near if near in fields else closest(name, fields) or ""
    prefix = f"{where}." if where else ""
    rest = f"did you mean {prefix}{near}?" if near else f"it has {', '.join(fields)}"
    return f"{owner or 'a run'} has no {name}; {rest}"
