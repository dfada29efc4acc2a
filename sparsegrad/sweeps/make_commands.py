"""The `make` commands that messages name as a remedy: with the values of the call that prints them."""

from __future__ import annotations

import shlex
from collections.abc import Collection

LANGUAGE_TASK = "oasst1"  # reads conversation trees, TREES, where the others read GLUE's folder, DATA
NO_TREES = "<file of conversation trees>"


def make_command(
    target: str,
    *,
    scale: str | None = "mini",
    data: str | None = None,
    trees: str | None = None,
    methods: Collection[str] = (),
    tasks: Collection[str] = (),
    args: Collection[str] = (),
) -> str:
    """`make TARGET SCALE=...` as it is typed in a shell; what is None or empty is left out.

    Args:
        target: of the Makefile.
        scale: the user's.
        data: the user's folder with GLUE.
        trees: the user's file of conversation trees; `NO_TREES` where one is needed and none is given.
        methods: those of the remedy.
        tasks: those of the remedy.
        args: further overrides of run.py.
    """
    places = {"SCALE": scale, "DATA": data, "TREES": trees}
    values = {**places, "METHODS": ",".join(methods), "TASKS": ",".join(tasks), "ARGS": " ".join(args)}
    return " ".join([f"make {target}", *(f"{name}={_quote(value)}" for name, value in values.items() if value)])


def search_command(
    target: str, methods: Collection[str], tasks: Collection[str], folder: str | None, args: Collection[str] = ()
) -> str:
    """`make search` or `make compare` for these methods and tasks; `folder` has the data of the tasks."""
    if LANGUAGE_TASK in tasks:
        return make_command(target, trees=folder or NO_TREES, methods=methods, tasks=tasks, args=args)
    return make_command(target, data=folder, methods=methods, tasks=tasks, args=args)


def _quote(value: str) -> str:
    """As a shell needs it, in double quotes where these are enough; a placeholder stays as it is."""
    if value == NO_TREES or value == shlex.quote(value):
        return value
    return shlex.quote(value) if set(value) & set('"$`\\!') else f'"{value}"'
