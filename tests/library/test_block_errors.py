"""Engine `fast`: linears become layers all together, or after an error, such as for lack of memory, none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import Basis, UserError
from sparsegrad.layers import block
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.replace import use_blocks


class Subclass(nn.Linear):
    """A linear that is replaced, not changed in place."""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Subclass(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight.requires_grad_(False)
    return model


def fail_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose call with this number finds no memory."""
    calls = iter(range(1, 100))

    def found(*args: Any) -> Any:
        if next(calls) == number:
            raise torch.OutOfMemoryError("out of memory")
        return function(*args)

    return found


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call could leave behind."""
    modules = {name: (module, type(module), sorted(vars(module))) for name, module in model.named_modules()}
    trained = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    return {"modules": modules, "trained": trained, "buffers": dict(model.named_buffers()), "text": repr(model)}


def assert_unchanged(model: nn.Module, before: dict[str, Any], x: Tensor, y: Tensor) -> None:
    assert describe(model) == before
    assert torch.equal(model(x), y)
    assert all(not module._non_persistent_buffers_set for module in model.modules())


@pytest.mark.parametrize("call", range(1, 9))  # each layer makes its core, and what is merged of it
def test_without_memory_for_a_layer_all_linears_stay(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    model, x = make_model(), torch.randn(2, 8)
    before, y = describe(model), model(x)
    monkeypatch.setattr(block, "new_core", fail_at(call, block.new_core))
    linears = {"a": {"0": model[0], "1": model[1], "2": model[2]}, "b": {"3": model[3]}}
    with pytest.raises(torch.OutOfMemoryError):
        use_blocks(model, linears, dict.fromkeys("ab", Basis.identity(8, 8)), 0.1)
    assert_unchanged(model, before, x, y)


def test_a_later_kind_that_is_refused_leaves_the_earlier_ones() -> None:
    model, x = make_model(), torch.randn(2, 8)
    before, y = describe(model), model(x)
    linears = {"a": {"0": model[0], "1": model[1]}, "b": {"2": model[2]}}
    with pytest.raises(UserError, match="does not fit"):
        use_blocks(model, linears, {"a": Basis.identity(8, 8), "b": Basis.identity(4, 4)}, 0.1)
    assert_unchanged(model, before, x, y)


@pytest.mark.parametrize("kind", [nn.Linear, LeanLinear])
@pytest.mark.parametrize("name", ["new_core", "count_writes", "watch"])
def test_a_linear_that_cannot_become_a_layer_stays(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    if kind is LeanLinear:
        LeanLinear.convert(model[0])
    before, y = describe(model), model(x)
    monkeypatch.setattr(block, name, fail_at(1, getattr(block, name)))
    with pytest.raises(torch.OutOfMemoryError):
        BlockLinear.convert(model[0], Basis.identity(8, 8), (2, 2))
    assert_unchanged(model, before, x, y)
    monkeypatch.undo()
    assert torch.equal(BlockLinear.convert(model[0], Basis.identity(8, 8), (2, 2))(x), y)


def test_layers_of_an_earlier_call_survive_a_refusal() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bases = {"a": Basis.identity(8, 8)}
    use_blocks(model, {"a": {"0": model[0]}}, bases, 0.1)
    with pytest.raises(UserError, match=r"wraps nn\.Linear"):
        use_blocks(model, {"a": {"1": model[1], "0": model[0]}}, bases, 0.1)
    assert [type(module) for module in model] == [BlockLinear, nn.Linear]
