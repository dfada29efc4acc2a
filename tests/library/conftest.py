"""The fixtures of library tests: they need torch, numpy and safetensors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_bert import ToyBert, toy_bert


@pytest.fixture
def small_bert() -> ToyBert:
    """A small classifier with BERT's module names, without dropout."""
    return toy_bert()


@pytest.fixture
def linear() -> torch.nn.Linear:
    """A linear (11, 7) in float64."""
    torch.manual_seed(0)
    return torch.nn.Linear(7, 11).double()


@pytest.fixture
def basis() -> Any:
    """A basis for `linear`."""
    from sparsegrad import hosvd

    torch.manual_seed(1)
    return hosvd(torch.randn(4, 11, 7, dtype=torch.float64))
