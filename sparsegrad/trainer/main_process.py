"""Work that one of several processes does for all: read and write what they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sparsegrad.distributed import from_main

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def on_main(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Let the main process call `function`; every process gets its value, or its `UserError`.

    All processes must call it, with equal arguments. A single process calls the function as it is.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        return from_main(lambda: function(*args, **kwargs))

    return call
