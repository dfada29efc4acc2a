"""Products in the dtypes of their operands, whatever block of `torch.autocast` the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate `function` to run with autocast off, on the CPU and the accelerator.

    Autocast rounds the operands of every product to half precision. That is meant for a model's forward pass. In an
    optimizer step it would round the change of the weights, and with weights in bfloat16 lose most of it.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ExitStack() as stack:
            for device in _find_autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


def _find_autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [device for device in devices if torch.is_autocast_enabled(device)]
