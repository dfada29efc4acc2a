"""Training that stands still says so: frozen weights, layers that are not called, gradients that are never finite."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, LR, bert, fast, train
from optim_cases import IN, groups, network, random_basis
from torch import Tensor, nn
from toy_models import toy_batches, toy_model

from sparsegrad import SparseGradAdamW, UserError, prepare

UNCALLED = r"no core of kind {} has had a gradient in 20 steps.*the forward of \S*dense and of the other layers"


def made(engine: str) -> tuple[Any, SparseGradAdamW]:
    model = bert()
    return model, prepare(model, BATCHES, lr=LR, calibration_steps=3, density=0.1, engine=engine)


def use_weights_of(model: nn.Module, kinds: str) -> None:
    """Let a fused kernel stand for the linears of some kinds: it reads their weight and calls no layer."""
    for name, module in model.named_modules():
        if re.search(rf"layer\.\d+\.({kinds})\.dense", name):
            module.forward = lambda x, module=module: nn.functional.linear(x, module.weight, module.bias)


def silent(model: Any, optimizer: SparseGradAdamW, batches: list[dict[str, Tensor]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, batches)


def test_cores_whose_layers_are_not_called_are_refused_before_anything_moves() -> None:
    model, optimizer = made("fast")
    use_weights_of(model, "intermediate|output")
    silent(model, optimizer, BATCHES[:1] * 19)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=UNCALLED.format("intermediate")):
        train(model, optimizer, BATCHES[:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_kind_may_wait_for_its_batch_and_is_mentioned_once() -> None:
    """As an expert of a kind of its own, or the layers for images while all batches are text; also after a resume."""
    model, optimizer = made("fast")
    use_weights_of(model, "output")
    silent(model, optimizer, BATCHES[:1] * 19)
    with pytest.warns(UserWarning, match=UNCALLED.format("output")):
        train(model, optimizer, BATCHES[:1])
    silent(model, optimizer, BATCHES[:1] * 25)
    model, optimizer = made("fast")
    silent(model, optimizer, BATCHES[:1])
    resumed_model, resumed = made("fast")
    resumed.load_state_dict(optimizer.state_dict())
    use_weights_of(resumed_model, "intermediate|output")
    silent(resumed_model, resumed, BATCHES[:1] * 25)


def test_a_kind_that_has_been_called_may_rest() -> None:
    """As experts do that no token of a batch goes to; with accumulation, too."""
    model, optimizer = made("fast")
    model(**BATCHES[0]).loss.backward()
    silent(model, optimizer, BATCHES[:1])
    use_weights_of(model, "output")
    silent(model, optimizer, BATCHES[1:])


def test_targets_alone_and_steps_without_any_gradient_are_none_of_its_business() -> None:
    model = bert()
    optimizer = fast(model, train_rest=False, modules_to_save=[])
    for _ in range(5):
        optimizer.step()
    silent(model, optimizer, BATCHES)


def test_frozen_cores_are_not_refused_and_start_when_they_thaw() -> None:
    model, optimizer = made("fast")
    cores = [core for group in optimizer.param_groups if group.get("kind") for core in group["params"]]
    for core in cores:
        core.requires_grad_(False)
    with pytest.warns(UserWarning, match="4 of 4 SparseGrad weights are frozen"):
        train(model, optimizer, BATCHES)
    for core in cores:
        core.requires_grad_(True)
    silent(model, optimizer, BATCHES)
    assert all(core.any() for core in cores)


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_frozen_weights_are_named_once(engine: str) -> None:
    model, optimizer = made(engine)
    frozen = optimizer.param_groups[0]["params"][1]
    frozen.requires_grad_(False)
    name = re.escape(optimizer.param_groups[0]["param_names"][1])
    with pytest.warns(UserWarning, match=rf"1 of 4 SparseGrad weights are frozen and do not train, such as {name}"):
        train(model, optimizer, BATCHES[:1])
    silent(model, optimizer, BATCHES)


@pytest.mark.parametrize("form", ["bert", "llama"])
def test_nothing_is_said_of_a_model_that_trains(form: str) -> None:
    model: Any = toy_model(form, torch.float32)
    batches = toy_batches(form, 12)
    silent(model, prepare(model, batches, lr=LR, calibration_steps=2, density=0.1), batches)


def skip(optimizer: SparseGradAdamW, model: nn.Sequential, steps: int, poison: float = float("nan")) -> list[str]:
    """Steps whose gradients of one bias are `poison`; returns the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, IN, dtype=torch.float64)).square().mean().backward()
            model[0].bias.grad[1] = poison
            optimizer.step()
    return [str(one.message) for one in found]


@pytest.mark.parametrize("fused", [None, True])
def test_gradients_that_are_never_finite_are_named_after_10_and_100_steps(fused: bool | None) -> None:
    model = network()
    sparse, rest = groups(model, basis=random_basis(), keep=9)
    rest["params"] = [(name, one) for name, one in model.named_parameters() if name != "0.weight"]
    sparse["params"] = [("0.weight", model[0].weight)]
    optimizer = SparseGradAdamW([sparse, rest], fused=fused)
    assert skip(optimizer, model, 9) == []
    (first,) = skip(optimizer, model, 1)
    assert first.startswith(
        "the last 10 steps changed nothing, since in each a gradient was not finite, now that of 0.b"
    )
    assert skip(optimizer, model, 89) == []
    (second,) = skip(optimizer, model, 1)
    assert second.startswith("the last 100 steps changed nothing")
    assert skip(optimizer, model, 200) == []
    assert optimizer.skipped_steps == 300


def test_a_few_skipped_steps_are_not_mentioned() -> None:
    model = network()
    optimizer = SparseGradAdamW(groups(model, basis=random_basis(), keep=9))
    for _ in range(8):
        assert skip(optimizer, model, 9) + skip(optimizer, model, 1, poison=0.1) == []
    assert optimizer.skipped_steps == 72
