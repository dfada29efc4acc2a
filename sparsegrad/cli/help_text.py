"""`run.py --help`: the groups with their options, and every setting with its value and its comment in conf/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.cli.explanations import read_explanations, read_title
from sparsegrad.runs.composing import compose_with_choices
from sparsegrad.runs.overrides import ALIASES, expand_aliases, explain, list_groups

WIDTH = 80
_INDENT = 33  # of the explanations
_ORDER = ("train", "protocol", "data", "method", "model", "task")  # what users change most comes first
_USAGE = """\
Fine-tune one model with one method on one task, and leave one record.

  python run.py                                  MiniLM, SparseGrad, snippets
  python run.py method=lora lr=5e-4 seed=7       other choices and values
  python run.py -m seed=1,2,3 method=lora,full   one run after the other
  python run.py sweep=quick method=lora          search the learning rate

  python run.py method=lora --help               the settings of another choice
  python run.py experiment=quickstart --help     what an experiment sets
"""
_FOOTER = """\
Hydra's own options: python run.py --hydra-help. -m is --multirun; --cfg job
prints the composed configuration. Tab completion: docs/command-line.md.
Records: sparsegrad records."""


def make_help(overrides: Sequence[str], conf: Path) -> str:
    """The help of run.py for the choices and values that `overrides` make.

    Raises:
        UserError: for an override that Hydra refuses.
    """
    try:
        composed, choices = compose_with_choices(expand_aliases(overrides), conf.resolve())
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, conf) from None
    groups = list_groups(conf)
    chosen = {group: choices.get(group) for group in groups}
    parts = [_USAGE, _describe_groups(groups, chosen, conf), *_describe_settings(composed, chosen, conf), _FOOTER]
    return "\n".join(parts)


def _describe_groups(groups: Mapping[str, list[str]], chosen: Mapping[str, str | None], conf: Path) -> str:
    """Each group with its current choice, what that is, and the other options."""
    lines = ["Groups: group=option"]
    for group, options in groups.items():
        choice = chosen[group]
        about = read_title(conf / group / f"{choice}.yaml") if choice in options else "none chosen"
        lines += _format_line(f"{group}={choice if choice in options else ''}", about)
        others = [option for option in options if option != choice]
        lines += textwrap.wrap("or " + ", ".join(others), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _describe_settings(composed: DictConfig, chosen: Mapping[str, str | None], conf: Path) -> Iterator[str]:
    """Blocks of lines: the settings of a run, then those of each node."""
    values = {str(name): _resolve(composed, str(name)) for name in composed}
    nodes = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in values.items() if name not in nodes and name not in chosen}
    abouts = read_explanations(conf, chosen, nodes)
    yield "\n".join(["Settings: key=value", *_list_values(single, "", abouts)]) + "\n"
    for name in sorted(nodes, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        lines = list(_list_values(nodes[name], f"{name}.", abouts))
        title = f"{name}={chosen[name]}: {name}.key=value" if chosen.get(name) else f"{name}: {name}.key=value"
        if lines:
            yield "\n".join([title, *lines]) + "\n"


def _resolve(composed: DictConfig, name: str) -> Any:
    """The value with its interpolations filled in; as text where that fails."""
    try:
        value = composed[name]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        value = composed._get_node(name)
        return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else str(value)


def _list_values(node: Mapping[str, Any], prefix: str, abouts: Mapping[str, str]) -> Iterator[str]:
    """One line per setting; nodes inside, such as the sizes of a model, as one value."""
    short = {path: alias for alias, path in ALIASES.items()}
    for name, value in node.items():
        path = f"{prefix}{name}"
        if str(name).startswith("_") or path.endswith(".name"):
            continue
        about = abouts.get(path, "")
        if path in short:
            about = f"{about}; short: {short[path]}=" if about else f"short: {short[path]}="
        yield from _format_line(f"{name}={_format_value(value)}", about)


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_format_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_line(setting: str, about: str) -> list[str]:
    """`  setting     explanation`, wrapped so that the explanations stay in one column."""
    left = textwrap.wrap(f"  {setting}", WIDTH, subsequent_indent="      ", break_on_hyphens=False)
    right = textwrap.wrap(about, WIDTH - _INDENT, break_on_hyphens=False)
    if right and len(left[-1]) < _INDENT - 1:
        left[-1] = f"{left[-1]:<{_INDENT}}{right.pop(0)}"
    return left + [" " * _INDENT + line for line in right]
