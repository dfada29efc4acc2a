"""Orders of products: what they cannot follow is refused by name, or left to the optimizer."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_orders import NAMES, Network, assert_same, bases, loss_of, optimizer_for, tokens, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsegrad import Basis, UserError, prepare
from sparsegrad.layers.lean import LeanLinear


def test_what_adds_a_plain_gradient_is_refused() -> None:
    model = Network()
    optimizer_for(model, "auto")
    with pytest.raises(UserError, match=r"penalty on the weight.*weight_decay=.*rotation_order='gradient'"):
        (loss_of(model, tokens(5)) + model.up.weight.square().sum()).backward()
    copied = copy.deepcopy(model)
    with pytest.raises(UserError, match="penalty on the weight"):
        (loss_of(copied, tokens(5)) + copied.up.weight.square().sum()).backward()
    other = Network()
    optimizer_for(other, "auto")
    with pytest.raises(UserError, match="did not compute"):
        nn.functional.linear(tokens(5), other.up.weight).sum().backward()
    plain = Network()
    optimizer_for(plain, "gradient")
    (loss_of(plain, tokens(5)) + plain.up.weight.square().sum()).backward()


@pytest.mark.parametrize("place", range(4))
def test_a_penalty_is_refused_where_the_model_runs_several_times(place: int) -> None:
    """As in DPO, SimCSE and R-Drop. When autograd adds the penalty depends on its place in the loss."""
    model, loss = Network(), torch.zeros(())
    optimizer_for(model, "auto")
    for number in range(4):
        loss = loss + (model.up.weight.square().sum() if number == place else loss_of(model, tokens(5, number)))
    with pytest.raises(UserError, match=r"up\.weight.*penalty on the weight"):
        loss.backward()
    assert not model.up._guard._sums
    assert not model.down._guard._sums


@pytest.mark.parametrize("calls", [2, 3])
def test_calls_in_one_backward_pass_add_up(calls: int) -> None:
    gradients = []
    for order in ("auto", "gradient"):
        model = Network()
        optimizer_for(model, order)
        for _ in range(2):  # and so do backward passes
            sum(loss_of(model, tokens(5, seed)) for seed in range(calls)).backward()  # type: ignore[union-attr]
        gradients.append(model.up.weight.grad)
    assert torch.allclose(gradients[0], bases()["up"].rotate(gradients[1]))


def test_a_layer_may_run_before_within_and_after_a_reentrant_checkpoint() -> None:
    """The checkpoint starts a backward pass within the other one."""
    gradients = []
    for order in ("auto", "gradient"):
        model = Network()
        optimizer_for(model, order)
        model(checkpoint(model, model(tokens(5)), use_reentrant=True)).square().sum().backward()
        gradients.append(model.up.weight.grad)
    assert torch.allclose(gradients[0], bases()["up"].rotate(gradients[1]))


def test_a_backward_pass_that_fails_leaves_nothing() -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError

    model = Network()
    optimizer_for(model, "auto")
    x = tokens(5).requires_grad_()
    y = x * 1
    y.register_hook(fail)
    with pytest.raises(MemoryError):
        (loss_of(model, x) + loss_of(model, y)).backward()
    assert not model.up._guard._sums
    loss_of(model, x).backward()


@pytest.mark.parametrize("compiled", [True, False])
def test_weights_given_to_functional_call_get_plain_gradients(compiled: bool) -> None:
    torch.compiler.reset()
    gradients = []
    for order in ("auto", "gradient"):
        model = Network()
        optimizer_for(model, order)
        fast = {name: one.detach().clone().requires_grad_() for name, one in model.named_parameters()}

        def loss(fast: dict[str, torch.Tensor], model: nn.Module = model) -> torch.Tensor:
            return torch.func.functional_call(model, fast, (tokens(5),)).square().sum()

        called = torch.compile(loss, backend="aot_eager") if compiled else loss
        gradients.append(torch.autograd.grad(called(fast), list(fast.values())))
        own = dict(model.named_parameters())
        called(own).backward()  # the model's own weights, as without functional_call
        other = bases()["up"].rotate(gradients[-1][0]) if order == "auto" else gradients[-1][0]
        assert torch.allclose(model.up.weight.grad, other)
    assert all(map(torch.allclose, *gradients))


def test_a_gradient_that_flows_on_from_functional_call_is_refused() -> None:
    """As in MAML: the weights of the inner step depend on the model's."""
    model = Network()
    optimizer_for(model, "auto")
    fast = {name: one - 0.1 * one.detach() for name, one in model.named_parameters()}
    with pytest.raises(UserError, match=r"did not compute.*rotation_order='gradient'"):
        torch.func.functional_call(model, fast, (tokens(5),)).sum().backward()


@pytest.mark.parametrize("calls", list(itertools.product("ec", repeat=3)), ids="".join)
def test_eager_and_compiled_calls_of_one_layer_add_up(calls: tuple[str, ...]) -> None:
    torch.compiler.reset()
    gradients = []
    for order in ("auto", "gradient"):
        model = Network()
        optimizer_for(model, order)
        compiled = torch.compile(model.up, backend="aot_eager")
        for call in calls:
            (compiled if call == "c" else model.up)(tokens(5)).square().sum().backward()
        sum((compiled if call == "c" else model.up)(tokens(5)).square().sum() for call in calls).backward()
        gradients.append(model.up.weight.grad)
    torch.testing.assert_close(gradients[0], bases()["up"].rotate(gradients[1]))


def test_a_parameter_that_replaces_the_weight_has_rotated_gradients_as_before() -> None:
    """An optimizer that follows it, as libraries arrange that replace parameters, takes them for rotated."""
    model = Network()
    optimizer_for(model, "auto")
    loss_of(model, tokens(5)).backward()
    expected = model.up.weight.grad
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    loss_of(model, tokens(5)).backward()
    assert torch.equal(model.up.weight.grad, expected)


def test_parameters_given_to_functional_call_get_plain_gradients_of_their_own() -> None:
    model, plain = Network(), Network()
    optimizer_for(model, "auto")
    optimizer_for(plain, "gradient")
    found = []
    for one in (model, plain):
        other = {name: nn.Parameter(value.detach().clone()) for name, value in one.named_parameters()}
        loss = loss_of(one, tokens(5)) + loss_of(one, tokens(7))
        (loss + torch.func.functional_call(one, other, (tokens(6),)).square().sum()).backward()
        found.append((one.up.weight.grad, other["up.weight"].grad))
    assert torch.allclose(found[0][0], bases()["up"].rotate(found[1][0]))
    assert torch.allclose(found[0][1], found[1][1])


def test_a_weight_that_was_replaced_is_checked_after_the_next_prepare() -> None:
    model = Network()
    optimizer_for(model, "auto")
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    optimizer_for(model, "auto")
    with pytest.raises(UserError, match="penalty on the weight"):
        (loss_of(model, tokens(5)) + model.up.weight.square().sum()).backward()


def test_clipping_by_value_is_refused_and_by_norm_is_not() -> None:
    model = Network()
    optimizer = optimizer_for(model, "auto")
    loss_of(model, tokens(20)).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    before = model.up.weight.clone()
    with pytest.raises(UserError, match=r"9 entries .*clipping by value.*clip by norm.*rotation_order='gradient'"):
        optimizer.step()
    assert torch.equal(model.up.weight, before)
    plain = Network()
    optimizer = optimizer_for(plain, "gradient")
    loss_of(plain, tokens(20)).backward()
    nn.utils.clip_grad_value_(plain.parameters(), 1e-3)
    optimizer.step()


def test_an_optimizer_of_an_earlier_prepare_with_another_basis_is_refused() -> None:
    model = Network()
    first = optimizer_for(model, "auto")
    others = {kind: Basis.identity(*basis.shape, torch.float64) for kind, basis in bases().items()}
    second = prepare(model, None, NAMES, keep=9, bases=others)
    loss_of(model, tokens(5)).backward()
    second.step()
    with pytest.raises(UserError, match="later prepare"):
        first.step()
    assert type(model.up) is LeanLinear
    optimizer_for(model, "gradient")
    assert type(model.up) is nn.Linear


def test_modules_that_cannot_compute_their_gradient_leave_the_rotation_to_the_optimizer() -> None:
    class Own(nn.Linear):
        pass

    model, reference = Network(), Network()
    model.up.__class__ = Own
    model.down.forward = model.down.forward  # as Accelerate's hooks patch it
    train(reference, optimizer_for(reference, "gradient"))
    train(model, optimizer_for(model, "auto"))
    assert (type(model.up), type(model.down)) == (Own, nn.Linear)
    assert_same(model, reference, 0)


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(UserError, match=r"rotation_order=fastest .*auto, gradient"):
        optimizer_for(Network(), "fastest")
    with pytest.raises(UserError, match=r'engine="fast" does not take rotation_order=tokens'):
        prepare(Network(), None, NAMES, bases=bases(), engine="fast", rotation_order="tokens")
