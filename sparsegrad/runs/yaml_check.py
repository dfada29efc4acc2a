"""Check YAML files before Hydra reads them, for which a broken file is a traceback of 40 lines.

Users add models, tasks and experiments of their own to conf/, so its files come from outside as well. Checking all of
them takes about 10 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sparsegrad.errors import UserError

MAX_NODES = 100_000  # with aliases written out; ours have some 30
MAX_DEPTH = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = "tag:yaml.org,2002:"


def check_folder(folder: Path) -> None:
    """Check every YAML file below `folder`.

    Raises:
        UserError: for the first that cannot be read.
    """
    for path in sorted(folder.rglob("*.yaml")):
        check_yaml(path)


def check_yaml(path: Path) -> None:
    """Check one file. It is loaded as plain data: no Python tag is followed.

    Raises:
        UserError: when it is not UTF-8, not YAML, repeats a key, has tags that are not plain data, or has aliases that
            would exhaust memory.
    """
    try:
        if path.stat().st_size > MAX_NODES * 10:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        root = yaml.compose(text, Loader=_LOADER)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ValueError("it is not a mapping")
        if root is not None and _count(root, {}) > MAX_NODES:
            raise ValueError("expanded, its aliases are too large")
        yaml.load(text, Loader=_LOADER)  # of plain data alone: numbers and dates that are none
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): correct it, or restore it from the repository") from None


def _check_events(text: str) -> None:
    """Refuse what nodes do not show: None without quotes or tag, and deep nesting, before the C composer recurses.

    Its stack overflow would end the process.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.ScalarEvent) and event.value == "None" and not event.style and event.tag is None:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: None is a text in YAML; write null, or 'None' for the text")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH}")


def _count(node: Any, known: dict[int, int | None]) -> int:
    """Number of nodes with aliases expanded. `known` caches counts; None marks a node that is being counted."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ValueError("an alias contains itself")
        return found
    known[id(node)] = None
    _check_plain(node)
    count = 1 + sum(_count(child, known) for child in _children(node))
    known[id(node)] = count
    return count


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_plain(node: Any) -> None:
    place = f"line {node.start_mark.line + 1}"
    if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python/"):
        raise ValueError(f"{place}: tag {node.tag} is not plain data")
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) < len(node.value):
            raise ValueError(f"{place}: a key is not a text")
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{place}: key {twice[0]} is repeated")
