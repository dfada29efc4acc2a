"""A step of torch's own optimizer, called from the step of a subclass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def unwrap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """AdamW's step without torch's wrapper.

    torch wraps the `step` of a class when the first instance is created. The wrapper calls step hooks, which the
    wrapper of the subclass has already called.
    """
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step
