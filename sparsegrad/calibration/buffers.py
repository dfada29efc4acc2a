"""Buffers of a model that a forward pass in train mode changes, such as the running mean of a BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Inside the context, forward passes may change the buffers of the state dict; afterwards all are as before."""
    before = [(module, name, buffer, buffer.clone()) for module, name, buffer in _persistent_buffers(model)]
    try:
        yield
    finally:
        for module, name, buffer, values in before:
            # Compared first: what no pass changes may be a tensor that cannot be written, such as an expanded one.
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)
            module._buffers[name] = buffer  # a module may have put another tensor in its place


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of each buffer that the state dict holds.

    The others are caches, such as the frequencies of dynamic RoPE: an attribute of the module may describe what is in
    them, so that they must not be set back alone.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and name not in module._non_persistent_buffers_set:
                yield module, name, buffer
