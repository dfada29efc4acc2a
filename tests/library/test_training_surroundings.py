"""What surrounds a training step: autocast, inference mode, averaged weights, gradients of the second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_checks import ENGINES, IN, OUT, TOKENS, basis_of, draw
from fast_checks import BATCHES, bert, fast, train
from test_orders import NAMES, Network, bases, loss_of, optimizer_for, tokens
from torch import nn

from sparsegrad import UserError, prepare
from sparsegrad.layers.rotated import SparseGradLinear


def _in_autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("order", ["auto", "tokens", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_and_step_within_autocast_are_those_outside(order: str, dtype: torch.dtype) -> None:
    changed: list[Any] = []
    for inside in (False, True):
        model = Network().to(dtype)
        optimizer = prepare(model, None, NAMES, keep=9, bases=bases(), rotation_order=order, lr=1e-3)
        for step in range(3):
            with _in_autocast(enabled=dtype == torch.float32):  # the products of the forward pass are alike
                loss = loss_of(model, tokens(20).to(dtype))
                if inside and order != "gradient":  # otherwise the product itself is autocast's
                    loss.backward()
            if not inside or order == "gradient":
                loss.backward()
            with _in_autocast(enabled=inside):
                torch.manual_seed(step + 10 * inside)  # on which the rounding of bfloat16 weights does not depend
                optimizer.step()
            optimizer.zero_grad()
        changed.append([parameter.detach() for parameter in model.parameters()])
    for outside, inside_ in zip(*changed, strict=True):
        assert torch.equal(outside, inside_)


def test_compiled_layers_do_not_rotate_in_the_autocast_of_the_forward_pass() -> None:
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        model = Network().float()
        optimizer_for(model, "auto")
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with _in_autocast():
            loss = loss_of(called, tokens(20).float())
        loss.backward()
        gradients.append(model.up.weight.grad)
    assert torch.equal(*gradients)


def test_a_closure_runs_in_the_autocast_of_its_caller() -> None:
    model, seen = Network().float(), []
    optimizer = prepare(model, None, NAMES, keep=9, bases=bases())

    def closure() -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        loss = loss_of(model, tokens(5).float())
        loss.backward()
        return float(loss)

    with _in_autocast():
        optimizer.step(closure)
    assert seen == [True]


def test_the_layer_rotates_its_weight_exactly_within_autocast() -> None:
    linear, basis = nn.Linear(IN, OUT), basis_of(OUT, IN).to(dtype=torch.float32)
    with _in_autocast():
        layer = SparseGradLinear.from_linear(linear, basis, density=0.5)
    assert torch.equal(layer.rotated_weight, basis.rotate(linear.weight))


def test_fast_trains_on_after_a_validation_in_inference_mode() -> None:
    model = bert()
    optimizer = fast(model)
    with _in_autocast():
        with torch.inference_mode():
            model(**BATCHES[0])
        train(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_gradient_the_outputs_are_those_with_one(engine: str, enabled: bool, dtype: torch.dtype) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT), basis_of(OUT, IN).to(dtype=torch.float32), 0.5).to(dtype)
    x = draw(2, TOKENS, IN).to(dtype).transpose(0, 1)
    with _in_autocast(enabled=enabled):
        expected = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("engine", ["lean", "block"])
def test_without_a_gradient_autocast_casts_a_weight_once(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT, bias=False), basis_of(OUT, IN).to(dtype=torch.float32), 0.5)
    x = draw(TOKENS, IN).bfloat16()
    with torch.no_grad(), _in_autocast(), torch.profiler.profile() as profile:
        for _ in range(5):
            layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_to_copy"] == 1
    assert counts["aten::mm"] == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_per_sample_are_refused(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT).double(), basis_of(OUT, IN), 0.5)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))
    with pytest.raises(UserError, match=r"torch\.func.*rotation_order='gradient'"):
        per_sample(draw(TOKENS, IN))


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_mode_gradients_are_refused(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT).double(), basis_of(OUT, IN), 0.5)
    x, ad = draw(TOKENS, IN), torch.autograd.forward_ad
    with ad.dual_level(), pytest.raises(UserError, match=r"dual_level.*rotation_order='gradient'"):
        layer(ad.make_dual(x, x))
    layer(x)


def test_the_remedy_for_gradients_per_sample_gives_them() -> None:
    gradients = []
    for model in (Network(), Network()):
        if not gradients:
            optimizer_for(model, "gradient")

        def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (x[None],)).square().sum()

        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, tokens(5)))
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_the_second_order_is_refused(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT).double(), basis_of(OUT, IN), 0.5)
    x = draw(TOKENS, IN).requires_grad_()
    with pytest.raises(UserError, match=r"create_graph=True.*rotation_order='gradient'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_the_remedy_for_second_orders_gives_those_of_autograd() -> None:
    x = tokens(5).requires_grad_()
    gradients = []
    for model in (Network(), Network()):
        if not gradients:
            optimizer_for(model, "gradient")
        (slope,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        slope.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_pass_that_needs_no_weight_gradient_leaves_nothing_for_the_next() -> None:
    model = Network()
    optimizer_for(model, "auto")
    x = tokens(5).requires_grad_()
    torch.autograd.grad(loss_of(model, x), x)
    assert not model.up._guard._sums  # as large as the weights
    assert not model.down._guard._sums
    with pytest.raises(UserError, match="penalty on the weight"):
        (loss_of(model, x) + model.up.weight.square().sum()).backward()


def test_prepare_drops_plain_gradients_of_the_weights_it_rotates() -> None:
    model, fresh = Network(), Network()
    loss_of(model, tokens(5)).backward()
    optimizers = [optimizer_for(one, "auto") for one in (model, fresh)]
    for one, optimizer in zip((model, fresh), optimizers, strict=True):
        loss_of(one, tokens(7)).backward()
        optimizer.step()
    assert torch.equal(model.up.weight, fresh.up.weight)


def test_a_copy_of_data_parallel_is_refused() -> None:
    model = Network()
    optimizer_for(model, "auto")
    replica = model.up._replicate_for_data_parallel()
    replica.weight, replica.bias = (
        model.up.weight * 1,
        model.up.bias * 1,
    )  # tensors with a history, as DataParallel gives
    with pytest.raises(UserError, match=r"DataParallel.*torchrun.*rotation_order='gradient'"):
        replica(tokens(3))


@pytest.mark.parametrize(("sides", "alike"), [("in", "rows"), ("out", "columns")])
def test_neurons_that_are_alike_are_not_taken_for_clipped_gradients(sides: str, alike: str) -> None:
    linear = nn.Linear(16, 16, bias=False).double()
    model = nn.Sequential(linear)
    optimizer = prepare(model, None, {"up": "0"}, keep=64, bases={"up": basis_of(16, 16)}, sides=sides)
    dy, x = draw(TOKENS, 16), draw(TOKENS, 16, seed=1)
    alone = dy if alike == "rows" else x
    alone.copy_(alone[:, :1].expand_as(alone))
    (model(x) * dy).sum().backward()
    optimizer.step()
