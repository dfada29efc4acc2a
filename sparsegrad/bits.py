"""The bits of numbers, read as integers.

Comparisons and sums of these are exact and the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def as_integers(tensor: Tensor) -> Tensor:
    """A view of `tensor` with integers of the same size.

    Compared as integers, NaN equals itself and 0.0 differs from -0.0; and sums of integers, unlike those of floating
    point numbers, are equal in any order and on any device.
    """
    # Complex numbers of 16 bytes are two integers each.
    return tensor.detach().view(_INTEGERS[min(tensor.element_size(), 8)])
