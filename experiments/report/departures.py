"""Whether a record follows its plan: a plan's name on the command line does not stop other overrides."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.report.arms import changed_options, find_value, normalise, parse_scalar
from experiments.report.plans import EvidencePlan, load_node
from sparsegrad.runs.keys import LATER, flatten

SECTIONS = ("train", "protocol", "data", "model")
# Where the data are, on which device, and how many rows an evaluation takes at once do not change a result.
FREE = {"data.dir", "train.device", "train.eval_batch_size", "train.lr", "protocol.name"}
SAME_RESULT = ("_target_", "name", "rotation_order")  # of a method's options; the name is compared with the grid
RATE = "train.lr"
GIVEN = dict.fromkeys(("paper", "authors"), ("train.batch_size", RATE))  # source of hyperparameters -> what it gives
# Settings of a model or task that say where it is read from, which a record's content hash covers, or the default rate.
DESCRIBED = {"model": ("source", "revision", "lr", "trust_remote_code"), "task": ("_target_", "eval_base")}
CELL = ("model", "task", "method")  # settings may refer to those of a run, `${task.usual.max_length}`


def find_departures(record: Mapping[str, Any], plan: EvidencePlan) -> list[str]:
    """What differs from the plan in a record, as `key=value`; empty if it follows it.

    The learning rate counts as planned if it comes from the plan's search or published table, or is one of its grid.
    """
    config = record["config"]
    cell = json.dumps({group: config[group] for group in CELL}, sort_keys=True)
    given = GIVEN.get(plan.hparams or "", ())  # `_other_cell` says where these are from
    found = [
        f"{key}={value}"
        for key, expected in _expected(plan.path, plan.sha256, cell).items()
        if key not in given and not _is_swept(key, plan) and not _equal(value := _read_value(config, key), expected)
    ]
    return [*found, *_other_cell(record, plan)]


def _read_value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a setting in a record; the one that means "as before" if the setting is newer than the record."""
    value, (group, _, name) = find_value(config, key), key.partition(".")
    return LATER.get((group, name)) if value is None else value


def _other_cell(record: Mapping[str, Any], plan: EvidencePlan) -> Iterator[str]:
    """Values outside the plan's grid, options of the method that it does not set, and rates by hand."""
    config = record["config"]
    if plan.seeds and config["seed"] not in plan.seeds:
        yield f"seed={config['seed']}"
    for key, allowed in plan.grid.items():
        is_group = isinstance(config.get(key), Mapping)
        value = config[key]["name"] if is_group else _read_value(config, key)
        planned = [_parse_value(one.rpartition("/")[2] if is_group else one) for one in allowed]  # `peft/dora`: dora
        if key != "seed" and not any(_equal(normalise(value), one) for one in planned):
            yield f"{key}={value}"
    yield from _other_options(config, plan)
    for group in DESCRIBED:
        yield from _other_settings(config, plan, group)
    if plan.hparams is not None:
        given = record.get("hparams") or {}
        for key in GIVEN.get(plan.hparams, (RATE,)):
            if key not in plan.grid and (given.get("from") != plan.hparams or key not in given):
                source = f"from {given['from']}" if key in given else "by hand"
                yield f"{key}={find_value(config, key)} {source}"


def _other_settings(config: Mapping[str, Any], plan: EvidencePlan, group: str) -> Iterator[str]:
    """Settings of the model or the task that are other than its YAML's and the plan's, or that neither of them has.

    A setting that is newer than the record is none.
    """
    found, name = flatten(config.get(group) or {}), str(config[group]["name"])
    expected = _read_settings(plan.path, plan.sha256, group, name)
    for key, value in found.items() if expected else ():
        is_added = key not in expected and value not in (None, LATER.get((group, key)))
        is_other = key in expected and "${" not in str(expected[key]) and not _equal(value, expected[key])
        if (is_added or is_other) and key not in DESCRIBED[group] and f"{group}.{key}" not in plan.grid:
            yield f"{group}.{key}={value}"


@functools.cache
def _read_settings(path: Path, sha256: str, group: str, name: str) -> Mapping[str, Any]:
    """Key -> value of conf/GROUP/NAME.yaml with what the plan sets of it; empty without that file."""
    file, node = path.parents[1] / group / f"{name}.yaml", load_node(path)
    if not file.is_file():
        return {}
    merged = OmegaConf.merge(OmegaConf.load(file), node.get(group) or {})
    content: Any = OmegaConf.to_container(merged, resolve=False)
    return flatten(content)


def _other_options(config: Mapping[str, Any], plan: EvidencePlan) -> Iterator[str]:
    """Options of the method that are neither its defaults nor the plan's: they would make another arm."""
    for name, value in changed_options(config, plan).items():
        if name not in SAME_RESULT and f"method.{name}" not in plan.grid:
            yield f"method.{name}={value}"


def _parse_value(text: str) -> Any:
    """A value of a grid: a number, a truth value, null, or a name."""
    try:
        return float(text)
    except ValueError:
        return normalise(parse_scalar(text))


def _is_swept(key: str, plan: EvidencePlan) -> bool:
    """Whether the plan's grid has this key, or the whole group that it is of."""
    return key in plan.grid or key.partition(".")[0] in plan.grid


@functools.cache
def _expected(path: Path, sha256: str, cell: str) -> Mapping[str, Any]:
    """Key -> planned value, of the keys whose value the plan or its base fixes; `sha256` is for the cache alone.

    `cell` is JSON of the run's model, task and method: `_other_settings` and `_other_options` hold them to the plan.
    """
    node, conf = load_node(path), path.parents[1]
    base: dict[str, Any] = {}
    if (file := conf / "config.yaml").is_file():
        whole: Any = OmegaConf.load(file)
        base |= {name: whole[name] for name in ("train", "data")}
    chosen = dict(_overrides(node))
    if (file := conf / "protocol" / f"{chosen.get('override /protocol')}.yaml").is_file():
        base["protocol"] = load_node(file)
        base["protocol"].pop("defaults", None)
    if (file := conf / "model" / f"{chosen.get('override /model')}.yaml").is_file():
        # Its name alone: models get new settings, which older records do not have.
        base["model"] = {"name": OmegaConf.select(OmegaConf.load(file), "name")}
    planned = OmegaConf.merge(base, node)
    return dict(_leaves(planned, OmegaConf.merge(json.loads(cell), planned)))


def _overrides(node: DictConfig) -> Iterator[tuple[str, str]]:
    for one in node.get("defaults", []):
        if isinstance(one, DictConfig):
            yield from ((str(key), str(value)) for key, value in one.items())


def _leaves(planned: Any, whole: Any) -> Iterator[tuple[str, Any]]:
    """The planned keys with their values, which `whole` resolves: it has the settings that they refer to."""
    for section in SECTIONS:
        raw: Any = OmegaConf.to_container(planned[section], resolve=False) if section in planned else {}
        for key in flatten(raw, f"{section}."):
            if key not in FREE:
                with contextlib.suppress(OmegaConfBaseException):
                    yield key, OmegaConf.select(whole, key, throw_on_missing=True)


def _equal(value: Any, expected: Any) -> bool:
    """Whether two values are the same; numbers by value."""
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(expected, numbers):
        return float(value) == float(expected)
    return bool(value == expected)
