"""A step of torch's own optimizer, called from the step of a subclass; and steps within torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def unwrap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """AdamW's step without torch's wrapper.

    torch wraps the `step` of a class when the first instance is created. The wrapper calls step hooks, which the
    wrapper of the subclass has already called.
    """
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


@functools.cache
def keep_out_of_compiler(cls: type, *names: str) -> None:
    """Exclude methods of `cls` from torch.compile, which fails at the selection of a step.

    Not as decorators: they import the compiler, which takes longer than importing the rest of this library and torch.
    """
    for name in names:
        setattr(cls, name, torch.compiler.disable(getattr(cls, name)))  # type: ignore[no-untyped-call]
