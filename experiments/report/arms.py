"""The name of an arm: its method, and the options in which it differs from conf/method/NAME.yaml."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paths import CONF
from experiments.report.plans import EvidencePlan
from sparsegrad.runs.keys import flatten
from sparsegrad.runs.records import ENGINE_NAMES

SKIPPED = ("_target_", "name", "steps", "rotation_order")  # no arm differs in these alone
SELECT = re.compile(r"\$\{oc\.select:([\w.]+)(?:,([^}]*))?\}")
_ABSENT = object()
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def arm_of(config: Mapping[str, Any], plan: EvidencePlan | None = None) -> str:
    """Name of a record's arm, such as `sparsegrad`, `sparsegrad keep=5500` or `dora config.r=4`.

    Args:
        config: the record's configuration.
        plan: its plan. Options that all arms of the plan share are not named; other values of its grid, such as the
            learning rate of the gates, are.
    """
    method, options = config["method"], changed_options(config, plan)
    others = [key for key in (plan.grid if plan else ()) if key not in ("seed", "task", "method")]
    options |= {key.rpartition(".")[2]: find_value(config, key) for key in others if not key.startswith("method.")}
    return arm_name(str(method["name"]), options)


def changed_options(config: Mapping[str, Any], plan: EvidencePlan | None = None) -> dict[str, Any]:
    """Options of a record's method in which it differs from conf/method/NAME.yaml and from what its plan sets."""
    method = config["method"]
    defaults = {**_read_defaults(str(method["name"])), **flatten(plan.method if plan else {})}
    return {
        name: value
        for name, value in flatten(method).items()
        if _is_known(name, defaults) and normalise(value) != normalise(_resolve(defaults.get(name), config))
    }


def arm_name(method: str, options: Mapping[str, Any]) -> str:
    """`method key=value ...`, sorted by key."""
    shown = [f"{name}={_format(value)}" for name, value in sorted(options.items()) if name not in SKIPPED]
    return " ".join([method, *shown])


def find_value(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` if there is none."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def _is_known(name: str, defaults: Mapping[str, Any]) -> bool:
    """Whether an option is one of today's method; in an open group, such as peft's `config`, every field is."""
    group = name.rpartition(".")[0]
    return name in defaults or (bool(group) and any(one.startswith(f"{group}.") for one in defaults))


@functools.cache
def _read_defaults(method: str, conf: Path = CONF) -> Mapping[str, Any]:
    """Dotted key -> value of a method's YAML, over those of the methods that its defaults name."""
    path = _list_methods(conf).get(method)
    return {} if path is None else dict(_read_options(path, conf))


@functools.cache
def _list_methods(conf: Path) -> Mapping[str, Path]:
    """Name of a method, which is not always that of its option (`peft/dora`) -> its YAML."""
    found = {}
    for path in sorted((conf / "method").rglob("*.yaml")):
        # Another method's damaged YAML stops its runs, no report.
        with contextlib.suppress(yaml.YAMLError, OmegaConfBaseException):
            content = _load(path)
            found[str(content.get("name", path.stem)) if isinstance(content, dict) else path.stem] = path
    return found


def _load(path: Path) -> Any:
    """A YAML as runs read it, its references as they are written."""
    return _parse(path.read_text(encoding="utf-8"))


def _parse(text: str) -> Any:
    # Not by PyYAML: to it, 1e-1 without a dot is a text.
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def _read_options(path: Path, conf: Path) -> dict[str, Any]:
    found = _load(path)
    merged: dict[str, Any] = {}
    for one in found.pop("defaults", []):
        # `sparsegrad` is beside the YAML or below conf/method; `/method/peft@_here_` is below conf.
        name = str(one).partition("@")[0] + ".yaml"
        base = conf / name.lstrip("/") if name.startswith("/") else path.parent / name
        if base.is_file() and base != path:
            merged |= _read_options(base, conf)
    return {**merged, **flatten(found)}


def _resolve(value: Any, config: Mapping[str, Any]) -> Any:
    """A default with its references to other parts of the configuration replaced by their values."""
    if not isinstance(value, str):
        return value
    if selected := SELECT.fullmatch(value):
        return _select(selected, config)
    if reference := REFERENCE.fullmatch(value):
        return find_value(config, reference[1])
    value = SELECT.sub(lambda found: str(_select(found, config)), value)  # inside a text, as in a budget
    return REFERENCE.sub(lambda found: str(find_value(config, found[1])), value)


def _select(selected: re.Match[str], config: Mapping[str, Any]) -> Any:
    found = find_value(config, selected[1], default=_ABSENT)
    return parse_scalar(selected[2] or "null") if found is _ABSENT else found  # a null that is there stays null


@functools.cache
def parse_scalar(text: str) -> Any:
    """A value as runs read it, remembered: a report reads the same few for every record."""
    return _parse(f"- {text}")[0]


def normalise(value: Any) -> Any:
    """An option's value, with the present name of an engine."""
    return ENGINE_NAMES.get(value, value) if isinstance(value, str) else value


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).stem if isinstance(value, str) and "/" in value else str(normalise(value))
