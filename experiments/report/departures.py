"""Whether a record follows its plan: a plan's name on the command line does not stop other overrides."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.report.plans import Plan, load_node

SECTIONS = ("train", "protocol", "data")
# Where the data are, on which device, and how many rows an evaluation takes at once do not change a result.
FREE = {"data.dir", "train.device", "train.eval_batch_size", "train.lr"}
OF_MODEL = re.compile(r"oc\.select:(task|model)\.|\$\{model\.|\$\{task\.(?!name\})")


def find_departures(record: Mapping[str, Any], plan: Plan) -> list[str]:
    """What differs from the plan in a record, as `key=value`; empty if it follows it.

    The learning rate counts as planned if it comes from the plan's search.
    """
    config = record["config"]
    found = [
        f"{key}={value}"
        for key, expected in _expected(plan.path, plan.sha256, str(config["task"]["name"])).items()
        if key not in plan.grid and not _equal(value := _find(config, key), expected)
    ]
    return [*found, *_other_cell(record, plan)]


def _other_cell(record: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Values outside the plan's grid, and a rate that its search did not give."""
    config = record["config"]
    if plan.seeds and config["seed"] not in plan.seeds:
        yield f"seed={config['seed']}"
    for group in ("method", "task"):
        if group in plan.grid and config[group]["name"] not in plan.grid[group]:
            yield f"{group}={config[group]['name']}"
    if plan.hparams is not None and "train.lr" not in plan.grid:
        given = record.get("hparams") or {}
        if given.get("from") != plan.hparams or "train.lr" not in given:
            yield f"train.lr={_find(config, 'train.lr')} by hand"


@functools.cache
def _expected(path: Path, sha256: str, task: str) -> Mapping[str, Any]:
    """Key -> planned value, of the keys whose value the plan or its base fixes; `sha256` is for the cache alone."""
    node, conf = load_node(path), path.parents[1]
    base: dict[str, Any] = {}
    if (file := conf / "config.yaml").is_file():
        whole: Any = OmegaConf.load(file)
        base |= {name: whole[name] for name in ("train", "data")}
    protocol = dict(_overrides(node)).get("override /protocol")
    if (file := conf / "protocol" / f"{protocol}.yaml").is_file():
        base["protocol"] = OmegaConf.load(file)
    return dict(_leaves(OmegaConf.merge(base, node, {"task": {"name": task}})))


def _overrides(node: DictConfig) -> Iterator[tuple[str, str]]:
    for one in node.get("defaults", []):
        if isinstance(one, DictConfig):
            yield from ((str(key), str(value)) for key, value in one.items())


def _leaves(node: Any) -> Iterator[tuple[str, Any]]:
    for section in SECTIONS:
        raw: Any = OmegaConf.to_container(node[section], resolve=False) if section in node else {}
        for name, value in raw.items():
            key = f"{section}.{name}"
            # Defaults of the model or task: a record does not say what they were.
            if key not in FREE and name != "name" and not OF_MODEL.search(str(value)):
                with contextlib.suppress(OmegaConfBaseException):
                    yield key, node[section][name]


def _find(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name)


def _equal(value: Any, expected: Any) -> bool:
    """Whether two values are the same; numbers by value."""
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(expected, numbers):
        return float(value) == float(expected)
    return bool(value == expected)
