"""Precision of products: in the dtypes of their operands whatever autocast says, and in bfloat16 where it is fast."""

from __future__ import annotations

import functools
import platform
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


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16 and add up in float32.

    These are AVX512-BF16 or AMX on an x86 processor, and compute capability 8.0 on an NVIDIA GPU.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):  # torch has operators of oneDNN only where it is built in
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return bool(has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _find_autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [device for device in devices if torch.is_autocast_enabled(device)]
