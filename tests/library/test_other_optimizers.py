"""Optimizers that `prepare` did not return: what they cannot learn from is refused, and what they move counts."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, bert, blocks, fast, train
from test_orders import Network, loss_of, optimizer_for, tokens
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from sparsegrad import SparseGradAdamW, UserError, calibrate, to_linears

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def prepared() -> tuple[nn.Module, SparseGradAdamW]:
    model = Network()
    return model, optimizer_for(model, "auto")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Take a step; return whether the weight of `up` has moved."""
    before = model.up.weight.clone()
    loss_of(model, tokens(5)).backward()
    try:
        optimizer.step()
    finally:
        model.zero_grad()
        moved = not torch.equal(model.up.weight, before)
    return moved


def unpickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def refused(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    name = type(optimizer).__name__
    with pytest.raises(UserError, match=rf"^{name} got the rotated gradient of up\.weight.*to_linears"):
        step(model, optimizer)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: SparseGradAdamW(parameters, lr=0.1),  # by hand: its groups expect plain gradients
    ],
)
@pytest.mark.parametrize("of", [lambda model: model, copy.deepcopy, unpickled])
def test_another_optimizer_over_rotated_gradients_is_refused_before_it_moves_anything(
    make: Make, of: Callable[[nn.Module], nn.Module]
) -> None:
    model = of(prepared()[0])
    refused(model, make(model.parameters()))


def test_another_optimizer_is_refused_through_what_wraps_it_and_with_groups_of_the_first() -> None:
    model, own = prepared()
    refused(model, torch.optim.AdamW(own.param_groups))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, tokens(5))).backward()
    with pytest.raises(UserError, match="SGD got the rotated gradient"):
        scaler.step(sgd(model.parameters()))


def test_another_optimizer_is_refused_before_its_closure_runs() -> None:
    model, _ = prepared()
    with pytest.raises(UserError, match="SGD got the rotated gradient"):
        sgd(model.parameters()).step(lambda: pytest.fail("the closure has run"))


def test_a_wrapper_passes_the_steps_of_the_own_optimizer(tmp_path: Any) -> None:
    model, own = prepared()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        groups = [{name: value for name, value in group.items() if name != "param_names"} for group in own.param_groups]
        assert step(model, ZeroRedundancyOptimizer(groups, SparseGradAdamW, lr=0.1))
        with pytest.raises(UserError, match="SGD got the rotated gradient"):
            step(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
    finally:
        torch.distributed.destroy_process_group()


def test_another_optimizer_trains_what_is_not_rotated() -> None:
    model, own = prepared()
    before = model.up.bias.clone()
    assert not step(model, sgd([model.up.bias]))
    assert not torch.equal(model.up.bias, before)
    idle = sgd(model.parameters())
    idle.step()  # without a gradient nothing moves
    assert step(model, own)
    refused(model, idle)
    plain = Network()
    optimizer_for(plain, "gradient")
    assert step(plain, sgd(plain.parameters()))
    frozen = copy.deepcopy(model)
    frozen.up.weight.requires_grad_(False)
    frozen.down.weight.requires_grad_(False)
    assert not step(frozen, sgd(frozen.parameters()))


def test_to_linears_is_the_remedy_even_between_a_pass_and_its_step() -> None:
    model, _ = prepared()
    other, fresh = sgd(model.parameters()), Network()
    loss_of(model, tokens(5)).backward()
    to_linears(model)
    model.up.bias.grad = model.down.bias.grad = None
    assert step(model, other)
    step(fresh, sgd(fresh.parameters()))
    assert torch.equal(model.up.weight, fresh.up.weight)


class _WithLoss(Network):
    def forward(self, x: torch.Tensor) -> Any:
        return {"loss": super().forward(x).square().sum()}


def test_a_calibration_of_a_prepared_model_may_train_it_with_any_optimizer() -> None:
    """Its gradients are plain."""
    model = _WithLoss()
    optimizer_for(model, "auto")
    other, before = sgd(model.parameters()), model.up.weight.clone()
    linears = {"up": [model.up], "down": [model.down]}
    calibrate(model, [{"x": tokens(5)}], linears, 1, update=lambda: other.step())
    assert not torch.equal(model.up.weight, before)


def test_the_own_optimizer_takes_no_plain_gradients_of_a_calibration() -> None:
    model = _WithLoss()
    own = optimizer_for(model, "auto")
    model(tokens(5))["loss"].backward()
    own.step()  # which is remembered as right
    before = model.up.weight.clone()
    with pytest.raises(UserError, match="rotation_order='gradient'"):
        calibrate(model, [{"x": tokens(5)}], {"up": [model.up], "down": [model.down]}, 1, update=own.step)
    assert torch.equal(model.up.weight, before)


def test_an_idle_optimizer_over_a_prepared_model_steps_as_accelerate_calls_it() -> None:
    model, _ = prepared()
    sgd(model.parameters()).step(None)


def test_an_optimizer_that_passed_is_checked_again_with_other_weights() -> None:
    plain, (model, _) = Network(), prepared()
    other = sgd(plain.parameters())
    assert step(plain, other)
    other.param_groups[0]["params"] = list(model.parameters())
    refused(model, other)


def test_an_optimizer_for_plain_gradients_of_an_earlier_prepare_is_refused() -> None:
    model = Network()
    first = optimizer_for(model, "gradient")
    second = optimizer_for(model, "auto")
    with pytest.raises(UserError, match="later prepare"):
        step(model, first)
    assert step(model, second)


@pytest.mark.parametrize("of", [lambda model: model, copy.deepcopy])
def test_a_core_moved_by_a_fused_optimizer_reaches_its_weight(of: Callable[[nn.Module], nn.Module]) -> None:
    prepared_model = bert()
    fast(prepared_model)
    model = of(prepared_model)
    before = [layer.weight.clone() for layer in blocks(model)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, torch.optim.AdamW(trained, lr=1e-2, fused=True), BATCHES[:2])
    with torch.no_grad():
        model(**BATCHES[0])
    for layer, weight in zip(blocks(model), before, strict=True):
        assert not torch.equal(layer.weight, weight)
        assert torch.equal(layer.core, layer.merged)
