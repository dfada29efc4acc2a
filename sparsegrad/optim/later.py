"""A number that a device computes, read by the CPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A number on its way to the CPU.

    Attributes:
        number: a scalar tensor on the CPU; not valid before `has_arrived`.
    """

    def __init__(self, number: Tensor) -> None:
        self.number = number.to("cpu", non_blocking=number.is_cuda)
        self._arrival = torch.cuda.Event() if number.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(number.device))

    @property
    def has_arrived(self) -> bool:
        """Whether the device has come to it."""
        return self._arrival is None or self._arrival.query()  # type: ignore[no-untyped-call]
