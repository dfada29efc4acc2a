"""Linears of a user's own: functions of their own, conversions, kinds, and the names of wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from own_models import NAMES, Net, batches, outputs, prepared, train
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsegrad import Basis, UserError, find_mlp, prepare, to_linears
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.rotated import SparseGradLinear


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


def scale(model: Net) -> None:
    model.blocks[0].up = Scaled(8, 16)


def patch(model: Net) -> None:
    linear = model.blocks[0].up
    linear.forward = lambda input: 2 * nn.functional.linear(input, linear.weight, linear.bias)


@pytest.mark.parametrize("change", [scale, patch])
def test_a_linear_with_a_function_of_its_own_keeps_it_or_is_refused(change: Any) -> None:
    model = Net()
    change(model)
    with pytest.raises(UserError, match=r"blocks\.0\.up is a \w+ and has a forward of its own.*give engine=.exact."):
        prepared(model, engine="fast")
    before = model(**batches()[0]).loss
    optimizer = prepared(model)
    assert torch.equal(model(**batches()[0]).loss, before)
    weight = model.blocks[0].up.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model.blocks[0].up.weight, weight)


def test_a_linear_whose_tensors_accelerate_moves_is_accepted_by_fast() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Net()
    for block in model.blocks:
        hooks.add_hook_to_module(block.up, hooks.AlignDevicesHook("cpu"))
    train(model, prepared(model, engine="fast"))


def test_a_linear_with_another_parameter_is_refused_by_fast() -> None:
    model = Net()
    model.blocks[1].down.register_buffer("calls", torch.zeros(1))
    with pytest.raises(UserError, match=r"blocks\.1\.down is a Linear and has calls of its own"):
        prepared(model, engine="fast")


def test_the_core_stays_float32_when_the_model_is_converted() -> None:
    models = [Net(), Net().to(torch.bfloat16)]
    bases = prepared(Net(), engine="exact").bases
    optimizers = [prepare(model, None, NAMES, 0.3, 1e-2, bases=bases, engine="fast") for model in models]
    models[0].to(torch.bfloat16)
    for model, optimizer in zip(models, optimizers, strict=True):
        assert model.blocks[0].up.core.dtype == model.blocks[0].up.merged.dtype == torch.float32
        for batch in batches(3, seed=1):
            model(**{name: value.to(torch.bfloat16) for name, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_block_that_was_converted_to_float16_is_refused() -> None:
    model = Net()
    optimizer = prepared(model, engine="fast")
    model.half()
    batch = {name: value.half() for name, value in batches()[0].items()}
    model(**batch).loss.backward()
    with pytest.raises(
        UserError, match=r"the weight of a block is torch\.float16 now, in which small updates are lost"
    ):
        optimizer.step()


def test_a_trained_block_can_be_converted_to_float16_to_evaluate() -> None:
    model, x = Net(), batches()[0]["x"]
    train(model, prepared(model, engine="fast"))
    expected = outputs(copy.deepcopy(to_linears(copy.deepcopy(model))).half(), x.half())
    model.eval()
    model.half()
    assert torch.allclose(outputs(model, x.half()), expected, atol=1e-3)
    assert torch.equal(outputs(to_linears(model), x.half()), expected)


def test_pruning_after_prepare_is_refused_by_fast() -> None:
    model = Net()
    optimizer = prepared(model, engine="fast")
    for block in model.blocks:
        prune.l1_unstructured(block.up, "weight", amount=50)
    with pytest.raises(UserError, match="computed from other parameters, as by pruning"):
        train(model, optimizer)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))}) for _ in range(2)
        )


def test_the_linears_of_a_sequential_are_kinds_of_their_own() -> None:
    found = find_mlp(Listed(), ["mlp.0", "mlp.2"])
    assert {kind: list(names) for kind, names in found.items()} == {
        f"layers.*.mlp.{number}": [f"layers.{layer}.mlp.{number}" for layer in range(2)] for number in (0, 2)
    }


def as_ddp(model: nn.Module) -> nn.Module:
    """As `DistributedDataParallel`, which needs a process group to be made."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, as_ddp])
def test_kinds_do_not_have_the_names_of_wrappers(wrap: Any) -> None:
    kinds = ["blocks.*.up", "blocks.*.down"]
    assert list(find_mlp(wrap(Net()), NAMES)) == kinds
    model = Net()
    model.blocks[0] = wrap(model.blocks[0])
    assert list(find_mlp(model, NAMES)) == kinds


@pytest.mark.parametrize("kind", [BlockLinear, SparseGradLinear])
def test_the_input_has_the_name_of_torchs_linear(kind: Any) -> None:
    options: dict[str, Any] = {"core_shape": (2, 2)} if kind is BlockLinear else {"keep": 3}
    layer, x = kind.from_linear(nn.Linear(8, 6), Basis.identity(6, 8), **options), torch.randn(3, 8)
    assert torch.equal(layer(input=x), layer(x))
