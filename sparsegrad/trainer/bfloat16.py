"""Products of bfloat16 on a processor without instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sparsegrad.precision import has_bfloat16_products

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        # Within `torch.inference_mode`, where they are not taken apart:
        _aten.linear.default,
        _aten.matmul.default,
        _aten.scaled_dot_product_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)
# Attention returns its sums in float32 in any case.
_ROUNDED_OUTPUTS = {_aten._scaled_dot_product_flash_attention_for_cpu.default: 1}


@contextmanager
def fast_bfloat16(device: torch.device) -> Iterator[None]:
    """Within: on a processor without instructions for bfloat16, its products are computed in float32 and rounded.

    Instructions for bfloat16 (AVX512-BF16, AMX) add up in float32 and round once, too, so the results are as exact;
    only the order of the sums differs. Without them, torch multiplies about ten times slower in bfloat16 than in
    float32. Every operator within costs about 30 us more, so enter it only for code that multiplies bfloat16.
    """
    if device.type == "cpu" and not has_bfloat16_products(device):
        with _Float32Products():  # type: ignore[no-untyped-call]
            yield
    else:
        yield


class _Float32Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes products of bfloat16 in float32, and rounds their results."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(_is_bfloat16(argument) for argument in args):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map_only(Tensor, _widen, (args, dict(kwargs)))
        result = func(*wide_args, **wide_kwargs)
        if func in _ROUNDED_OUTPUTS:
            rounded = _ROUNDED_OUTPUTS[func]
            return (*(output.bfloat16() for output in result[:rounded]), *result[rounded:])
        return tree_map_only(Tensor, Tensor.bfloat16, result)


def _is_bfloat16(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype == torch.bfloat16


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
