"""The methods that a comparison takes: any option of conf/method."""

from __future__ import annotations

from experiments.paths import CONF
from sparsegrad.errors import check_choice


def list_methods() -> list[str]:
    """The options of conf/method."""
    folder = CONF / "method"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_method(name: str) -> str:
    """The option of conf/method that METHODS names, with or without its folder: `dora` is `peft/dora`.

    Raises:
        UserError: for an unknown method.
    """
    known = list_methods()
    short = [one for one in known if one.rpartition("/")[2] == name]
    if name not in known and len(short) == 1:
        return short[0]
    check_choice("METHODS", name, known, "a YAML of yours in conf/method/peft counts too")
    return name
