"""Error feedback: what a step does not keep is added to the next rotated gradient."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from test_orders import NAMES, Network, assert_same, bases, loss_of, tokens
from torch import nn

from sparsegrad import SparseGradAdamW, UserError, prepare, to_linears


def optimizer_for(model: nn.Module, **options: Any) -> SparseGradAdamW:
    given = {"keep": 9, "error_feedback": True, **options}
    return prepare(model, None, NAMES, lr=1e-2, bases=bases(), **given)


@pytest.mark.parametrize("release", [True, False])
def test_it_is_top_k_of_the_gradient_plus_what_was_not_kept(release: bool) -> None:
    """Against Adam on sparse gradients of the rotated weights, with the error kept by hand."""
    model = Network()
    optimizer = optimizer_for(model)
    rotated = {
        kind: nn.Parameter(basis.rotate(getattr(model, kind).weight.detach())) for kind, basis in bases().items()
    }
    errors = {kind: torch.zeros_like(weight) for kind, weight in rotated.items()}
    rest = [{"params": [weight], "keep": 9} for weight in rotated.values()]
    reference = SparseGradAdamW(rest, lr=1e-2)
    if release:
        optimizer.release_gradients()
    for seed, count in enumerate((5, 9, 40, 7, 5)):
        twin = copy.deepcopy(model)
        loss_of(twin, tokens(count, seed)).backward()
        optimizer.zero_grad()
        loss_of(model, tokens(count, seed)).backward()
        optimizer.step()
        for kind, weight in rotated.items():
            total = errors[kind] + getattr(twin, kind).weight.grad
            kept = (
                torch.zeros(total.numel()).double().scatter_(0, total.abs().flatten().topk(9).indices, 1).view_as(total)
            )
            errors[kind] = total * (1 - kept)
            weight.grad = (total * kept).to_sparse()
        reference.step()
    for kind, basis in bases().items():
        assert torch.allclose(getattr(model, kind).weight, basis.unrotate(rotated[kind]), atol=1e-10)
        assert torch.allclose(optimizer.state[getattr(model, kind).weight]["error"], errors[kind], atol=1e-10)


def test_with_everything_kept_there_is_no_error() -> None:
    plain, model = Network(), Network()
    optimizers = [optimizer_for(plain, error_feedback=False, keep=96), optimizer_for(model, keep=96)]
    for seed in range(3):
        for one, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(one, tokens(9, seed)).backward()
            optimizer.step()
    assert_same(model, plain, 0)


def test_a_skipped_step_leaves_the_error_alone() -> None:
    model = Network()
    optimizer = optimizer_for(model)
    loss_of(model, tokens(9)).backward()
    optimizer.step()
    before = {name: state["error"].clone() for name, state in zip("ud", optimizer.state.values(), strict=False)}
    model.up.weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for name, state in zip("ud", optimizer.state.values(), strict=False):
        assert torch.equal(state["error"], before[name])


def test_a_saved_state_continues_and_one_without_is_refused() -> None:
    model = Network()
    optimizer = optimizer_for(model)
    loss_of(model, tokens(9)).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(to_linears(copy.deepcopy(model)))
    again = optimizer_for(resumed)
    again.load_state_dict(saved)
    for one, its in ((model, optimizer), (resumed, again)):
        its.zero_grad()
        loss_of(one, tokens(9, 1)).backward()
        its.step()
    assert_same(model, resumed, 1e-12)
    with pytest.raises(UserError, match="error_feedback=True, this optimizer False"):
        optimizer_for(Network(), error_feedback=False).load_state_dict(saved)


def test_it_needs_layers_that_rotate() -> None:
    with pytest.raises(UserError, match="rotation_order at auto"):
        optimizer_for(Network(), rotation_order="gradient")
    model = Network()
    optimizer = optimizer_for(model)
    to_linears(model)
    loss_of(model, tokens(9)).backward()
    with pytest.raises(UserError, match="to_linears after the training"):
        optimizer.step()
