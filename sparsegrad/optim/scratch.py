"""Buffers that the weights of one optimizer step share."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor


class Scratch:
    """Buffers that the weights of a step share; on a CPU touching fresh memory costs more than the products."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized buffer of `shape`; the same memory for every call with this name and size."""
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.numel() != prod(shape)
            or (buffer.dtype, buffer.device) != (like.dtype, like.device)
        ):
            buffer = self._buffers[name] = like.new_empty(shape)
        return buffer.view(shape)
