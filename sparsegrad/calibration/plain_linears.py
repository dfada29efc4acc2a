"""How the linears compute their gradients while a calibration lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from sparsegrad.distributed import is_shard
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.replace import computes_gradient
from sparsegrad.layers.steps import recheck
from sparsegrad.optim.rotation import Rotation


@contextmanager
def lean_gradients(linears: Mapping[str, list[nn.Linear]], drop_padding: bool) -> Iterator[None]:
    """Inside the context, the linears compute plain gradients, and with `drop_padding` on a CPU they leave out padding.

    Padding costs a third of the weight gradients of short texts and nearly all of those of the last block, of which a
    classifier reads one token. Layers that an earlier `prepare` lets compute rotated gradients are set back meanwhile.
    """
    converted: list[LeanLinear] = []
    before: list[tuple[LeanLinear, Rotation | None, bool]] = []
    try:
        for linear in (linear for found in linears.values() for linear in found):
            if isinstance(linear, LeanLinear):
                before.append((linear, linear.rotation, linear.drop_padding))
                recheck()
                linear.rotation = None
                linear.drop_padding = linear.drop_padding or (drop_padding and linear.weight.is_cpu)
            elif drop_padding and linear.weight.is_cpu and computes_gradient(linear) and not is_shard(linear.weight):
                converted.append(LeanLinear.convert(linear, drop_padding=True))
        yield
    finally:
        for layer, rotation, drop_padding in before:
            layer.rotation, layer.drop_padding = rotation, drop_padding
        for layer in converted:
            layer.restore()
