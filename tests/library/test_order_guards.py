"""Orders of products: what they cannot follow is refused by name, or left to the optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from test_orders import NAMES, Network, assert_same, bases, loss_of, optimizer_for, tokens, train
from torch import nn

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
