"""Print constraints that pin every direct dependency of pyproject.toml to its lowest version.

`python scripts/lowest.py [extra ...] [name==version ...]`: dependencies of the extras are included. A pin replaces a
lower bound whose version is not available on this machine.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<lowest>[\w.]+)(,<[\w.]+)?")


def lowest(extras: list[str], pins: dict[str, str]) -> list[str]:
    """Lines `name==version` for the direct dependencies and those of `extras`; `pins` replace lower bounds."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = project["dependencies"] + [line for extra in extras for line in _lines(project, extra)]
    found = [_REQUIREMENT.fullmatch(line) for line in wanted]
    unbounded = [line for line, match in zip(wanted, found, strict=True) if match is None]
    if unbounded:
        raise SystemExit(f"no lower bound in {', '.join(unbounded)}: write name>=version")
    # The last bound counts, since that of an extra is the higher one.
    bounds = {match["name"]: match["lowest"] for match in found if match is not None}
    return [f"{name}=={version}" for name, version in sorted({**bounds, **pins}.items())]


def _lines(project: dict[str, Any], extra: str) -> list[str]:
    """The requirements of an extra; references to other extras of the project are resolved."""
    found = []
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", line)
        found += [one for name in own[1].split(",") for one in _lines(project, name)] if own else [line]
    return found


def main(arguments: list[str]) -> None:
    """The command line; see the module docstring."""
    pins = dict(argument.split("==", 1) for argument in arguments if "==" in argument)
    print("\n".join(lowest([argument for argument in arguments if "==" not in argument], pins)))


if __name__ == "__main__":
    main(sys.argv[1:])
