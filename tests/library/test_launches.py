"""A step's operator calls do not depend on the number of weights: on a GPU each call is a kernel launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_checks import basis_of, draw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad import SparseGradAdamW
from sparsegrad.optim import selection

# Operators that only describe memory and start no kernel.
_VIEWS = {"select", "view", "as_strided", "unbind", "slice", "detach", "alias", "unsqueeze", "expand", "t", "transpose"}
_VIEWS |= {"squeeze", "permute", "_unsafe_view", "empty", "empty_like", "new_empty", "split", "diagonal"}


class Calls(TorchDispatchMode):
    """Counts operator calls, those on a list of tensors once, as a GPU runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def calls_of_a_step(
    count: int, sides: str | None, moments: str, weight_decay: float, dtype: torch.dtype = torch.float32
) -> list[str]:
    weights = [nn.Parameter(draw(48, 40, seed=seed).to(dtype)) for seed in range(count)]
    basis = None if sides is None else basis_of(48, 40).only(sides)
    group = {"params": weights, "density": 0.05, "basis": basis, "moments": moments}
    optimizer = SparseGradAdamW([group], lr=1e-2, weight_decay=weight_decay)
    for step in range(2):  # the first one creates the moments
        for number, weight in enumerate(weights):
            weight.grad = draw(48, 40, seed=10 * step + number).to(dtype)
        with Calls() as calls:
            optimizer.step()
    return calls.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("moments", ["dense", "support"])
@pytest.mark.parametrize("sides", ["both", "in", None])
def test_more_weights_need_no_more_calls(
    sides: str | None, moments: str, weight_decay: float, dtype: torch.dtype
) -> None:
    two, eight = (calls_of_a_step(count, sides, moments, weight_decay, dtype) for count in (2, 8))
    assert eight == two


def test_weights_that_do_not_fit_together_are_processed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection._TOGETHER, "cpu", 4 * 48 * 40)
    assert len(calls_of_a_step(8, "both", "dense", 0.0)) > len(calls_of_a_step(4, "both", "dense", 0.0))
