"""The name of an arm: its method, and the options in which it differs from conf/method/NAME.yaml."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.paths import CONF
from experiments.report.plans import Plan
from sparsegrad.runs.records import ENGINE_NAMES

SKIPPED = ("_target_", "name", "steps", "rotation_order")  # no arm differs in these alone
SELECT = re.compile(r"\$\{oc\.select:([\w.]+)(?:,(.*))?\}")
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def arm_of(config: Mapping[str, Any], plan: Plan | None = None) -> str:
    """Name of a record's arm, such as `sparsegrad` or `sparsegrad keep=5500`.

    Args:
        config: the record's configuration.
        plan: its plan. Options that all arms of the plan share are not named; other values of its grid, such as the
            learning rate of the gates, are.
    """
    method = config["method"]
    defaults = {**_read_defaults(str(method["name"])), **(plan.method if plan else {})}
    options = {
        name: value
        for name, value in method.items()
        if name in defaults and _normalise(value) != _normalise(_resolve(defaults[name], config))
    }
    others = [key for key in (plan.grid if plan else ()) if key not in ("seed", "task", "method")]
    options |= {key.rpartition(".")[2]: _find(config, key) for key in others if not key.startswith("method.")}
    return arm_name(str(method["name"]), options)


def arm_name(method: str, options: Mapping[str, Any]) -> str:
    """`method key=value ...`, sorted by key."""
    shown = [f"{name}={_format(value)}" for name, value in sorted(options.items()) if name not in SKIPPED]
    return " ".join([method, *shown])


@functools.cache
def _read_defaults(method: str, conf: Path = CONF) -> Mapping[str, Any]:
    """The options in a method's YAML, over those of the methods that its defaults name."""
    path = conf / "method" / f"{method}.yaml"
    if not path.is_file():
        return {}
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    bases = [one for one in found.pop("defaults", []) if isinstance(one, str) and one != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= _read_defaults(base, conf)
    return {**merged, **found}


def _resolve(value: Any, config: Mapping[str, Any]) -> Any:
    """A default with its references to other parts of the configuration replaced by their values."""
    if not isinstance(value, str):
        return value
    if selected := SELECT.fullmatch(value):
        found = _find(config, selected[1])
        return yaml.safe_load(selected[2] or "null") if found is None else found
    return _find(config, reference[1]) if (reference := REFERENCE.fullmatch(value)) else value


def _find(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _normalise(value: Any) -> Any:
    return ENGINE_NAMES.get(value, value) if isinstance(value, str) else value


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).stem if isinstance(value, str) and "/" in value else str(_normalise(value))
