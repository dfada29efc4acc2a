"""The bytes of a tensor, to be hashed."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """All bytes of a tensor of any shape, dtype and device, by rows; a view where it lies so on the CPU."""
    # As numbers of one byte: numpy knows no bfloat16.
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
