"""What a layer of engine `fast` has merged is a parameter that never trains, whoever makes it anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fast_checks import bert, blocks, fast, train
from torch import Tensor, nn

from sparsegrad import Basis
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import FixedParameter


def make_layer() -> BlockLinear:
    return BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))


def encode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            x = layer.output.dense(layer.intermediate.dense(x).relu())
    return x


def test_accelerate_offloads_a_prepared_model() -> None:
    """It makes parameters anew by their class, with `requires_grad=`."""
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    train(model, fast(model))
    x = torch.randn(3, blocks(model)[0].weight.shape[1])
    before = encode(model.eval(), x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(layer.merged.is_meta and type(layer.merged) is FixedParameter for layer in blocks(model))
    assert torch.equal(encode(model, x), before)


def test_a_layer_is_made_without_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        layer = make_layer()
    assert layer.merged.is_meta
    assert type(layer.merged) is FixedParameter


def assign(layer: nn.Module) -> None:
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)


def to_empty(layer: nn.Module) -> None:
    layer.to("meta")
    layer.to_empty(device="cpu")


def overwrite(layer: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swap(layer: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("change", [assign, to_empty, overwrite, swap])
def test_what_is_merged_stays_fixed_when_torch_replaces_it(change: Callable[[nn.Module], None]) -> None:
    layer = make_layer()
    change(layer)
    layer.requires_grad_(True)
    assert layer.weight.requires_grad
    assert type(layer.merged) is FixedParameter
    assert not layer.merged.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "core", "merged"]
