"""What each setting means, from where it is written down: comments in conf/ and docstrings of the classes it fills.

The sources are read as text, so that help does not wait for transformers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
_KEY = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>[^#]*?)(?:\s+#\s*(?P<about>.*))?")
# Nodes of the configuration without `_target_`, and the classes that they fill.
_CLASSES = {
    "model": ("models", "ModelConfig"),
    "data": ("tasks", "DataConfig"),
    "train": ("runs", "TrainConfig"),
    "protocol": ("runs", "ProtocolConfig"),
    "tracker": ("runs", "TrackerConfig"),
}


def read_explanations(conf: Path, chosen: Mapping[str, str | None], nodes: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> its explanation; the most specific source wins.

    Args:
        conf: the folder of the configuration.
        chosen: group -> option.
        nodes: the composed configuration, as plain data; a node with `_target_` names its class.
    """
    found: dict[str, str] = {}
    if (conf / "experiment" / f"{chosen.get('experiment')}.yaml").is_file():
        found |= read_comments(conf / "experiment" / f"{chosen['experiment']}.yaml")
    for group, option in chosen.items():
        if (conf / group / f"{option}.yaml").is_file() and group != "experiment":
            found = {**_name_node(read_comments(conf / group / f"{option}.yaml"), group), **found}
    found = {**read_comments(conf / "config.yaml"), **found}
    for name, node in nodes.items():
        attributes = _read_class(name, node.get("_target_")) if isinstance(node, Mapping) else {}
        found = {**{f"{name}.{key}": about for key, about in attributes.items()}, **found}
    # `sweep` and `evidence` fill no class: what their other files say.
    for path in sorted([*(conf / "sweep").glob("*.yaml"), *(conf / "experiment").glob("*.yaml")]):
        others = {key: about for key, about in read_comments(path).items() if key.startswith(("sweep.", "evidence."))}
        found = {**others, **found}
    return found


def _name_node(comments: Mapping[str, str], group: str) -> dict[str, str]:
    """Keys from the root; files with `@package _global_` name their node themselves."""
    return {key if key.startswith(f"{group}.") else f"{group}.{key}": about for key, about in comments.items()}


def read_title(path: Path) -> str:
    """The first sentence of a YAML file's head comment."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = " ".join(line for line in lines if not line.startswith("@package"))
    # Not at the colon of a command, nor at the full stop of an abbreviation.
    return re.split(r"(?<=[a-z0-9)])(?:\.|:|;) (?=[A-Za-z0-9])", text, maxsplit=1)[0].rstrip(".")


def read_comments(path: Path) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line in a YAML file."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # indents and names of the nodes around a line
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _KEY.fullmatch(line)
        if match is None:
            continue
        indent = len(match["indent"])
        parents = [(depth, name) for depth, name in parents if depth < indent]
        if match["about"]:
            found[".".join([*(name for _, name in parents), match["name"]])] = match["about"].strip()
        parents.append((indent, match["name"]))
    return found


def _read_class(node: str, target: Any) -> dict[str, str]:
    """Field -> explanation, from the docstring of the class that a node fills and those of its bases."""
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        package = module.split(".")[1] if module.startswith("sparsegrad.") else ""
    else:
        package, name = _CLASSES.get(node, ("", ""))
    classes = _read_package(package) if package else {}
    found: dict[str, str] = {}
    while name in classes:
        text, bases = classes[name]
        found = {**dict(_read_attributes(text)), **found}
        name = next((base for base in bases if base in classes), "")
    return found


@cache
def _read_package(package: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Class -> its docstring and the names of its bases, of all modules of a package."""
    classes = {}
    for path in sorted((PACKAGE / package).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
                classes[node.name] = ast.get_docstring(node) or "", bases
    return classes


def _read_attributes(text: str) -> Iterator[tuple[str, str]]:
    """Names and first sentences of the section `Attributes:`."""
    section = text.partition("Attributes:\n")[2].split("\n\n")[0]
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section):
        names, sign, about = " ".join(entry.split()).partition(": ")
        if sign:
            about = re.split(r"(?<=[a-z0-9)`])\. ", about, maxsplit=1)[0]
            about = about.replace("`", "").rstrip(".").removesuffix("; or").replace("None", "null")
            yield from ((name.strip(), about) for name in names.split(","))
