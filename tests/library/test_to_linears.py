"""`to_linears` takes the blocks out again: the same function, adapters of it, and a training that goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, DENSITY, LR, bert, fast, train
from model_states import assert_equal, bits
from torch import nn

from sparsegrad import (
    Basis,
    SparseGradLinear,
    UserError,
    calibrate,
    describe,
    find_mlp,
    load_adapter,
    prepare,
    save_adapter,
    to_linears,
)
from sparsegrad.basis import load_bases, save_bases
from sparsegrad.layers.block import BlockLinear


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_to_linears_keeps_the_function_and_gives_the_plain_model(dtype: torch.dtype, close: float) -> None:
    plain, model = bert(dtype), bert(dtype)
    train(model, fast(model))
    before = model(**BATCHES[0]).logits
    assert to_linears(model) is model
    assert torch.allclose(model(**BATCHES[0]).logits, before, atol=close, rtol=0)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == [
        (name, p.requires_grad) for name, p in plain.named_parameters()
    ]
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(**BATCHES[0]).logits, model(**BATCHES[0]).logits)


def test_to_linears_takes_the_last_step_along() -> None:
    """No forward pass came after it."""
    model = bert(torch.float64)
    train(model, fast(model, fused=True), BATCHES[:2])
    other = copy.deepcopy(model)
    to_linears(model)
    assert torch.allclose(other(**BATCHES[0]).logits, model(**BATCHES[0]).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_copy_made_after_a_step_has_the_step(steps: int) -> None:
    """A copied core counts its writes anew: after one step its count is that of a core just made."""
    model = bert(torch.float64)
    train(model, fast(model), BATCHES[:steps])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    assert_equal(bits(twin), bits(model))


def test_to_linears_is_idle_where_there_is_nothing_and_turns_the_papers_layer_too() -> None:
    model = bert(torch.float64)
    modules, before, logits = list(model.modules()), bits(model), model(**BATCHES[0]).logits
    assert to_linears(model) is model
    assert list(model.modules()) == modules
    assert_equal(bits(model), before)
    dense = model.bert.encoder.layer[0].output.dense
    identity = Basis.identity(16, 32, torch.float64)
    model.bert.encoder.layer[0].output.dense = SparseGradLinear.from_linear(dense, identity, keep=3)
    assert type(to_linears(model).bert.encoder.layer[0].output.dense) is nn.Linear
    assert torch.allclose(model(**BATCHES[0]).logits, logits, atol=1e-10)


def test_a_layer_under_two_names_stays_one() -> None:
    layer = BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))
    model = to_linears(nn.ModuleDict({"one": layer, "two": layer}))
    assert model["one"] is model["two"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_an_adapter_gives_the_trained_weights_bit_for_bit(
    dtype: torch.dtype, with_optimizer: bool, tmp_path: Path
) -> None:
    base, model = bert(dtype), bert(dtype)
    optimizer = fast(model)
    train(model, optimizer)
    saved = save_adapter(to_linears(model), tmp_path, base=base, optimizer=optimizer if with_optimizer else None)
    assert saved.mlp_bytes > 0
    adapter = load_adapter(base, tmp_path)
    adapter.merge()
    assert_equal(bits(base), bits(model))
    adapter.unmerge()
    assert_equal(bits(base), bits(bert(dtype)))


@pytest.mark.parametrize("base", [bert(), bits(bert()), None])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_an_adapter_of_layers_is_refused_with_the_remedy(base: Any, with_optimizer: bool, tmp_path: Path) -> None:
    """Among them tensors as base: cores would be stored as if they were a new head's."""
    model = bert()
    optimizer = fast(model)
    train(model, optimizer)
    message = r"^bert\.\S+ is a BlockLinear, which no base has: call sparsegrad\.to_linears\(model\) first, then save$"
    with pytest.raises(UserError, match=message):
        save_adapter(model, tmp_path, base=base, optimizer=optimizer if with_optimizer else None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fused", [None, True])
def test_a_stopped_training_goes_on_to_the_bit_without_a_second_calibration(fused: bool | None, tmp_path: Path) -> None:
    whole, halves, fresh = bert(), bert(), bert()
    train(whole, fast(whole, fused=fused, weight_decay=0.1))
    mlp = {kind: found.values() for kind, found in find_mlp(halves).items()}
    save_bases(tmp_path / "bases.safetensors", calibrate(halves, BATCHES, mlp, steps=3))
    options = {"engine": "fast", "lr": LR, "density": DENSITY, "fused": fused, "weight_decay": 0.1}
    first = prepare(halves, None, bases=load_bases(tmp_path / "bases.safetensors"), **options)
    train(halves, first, BATCHES[:3])
    torch.save({"model": halves.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")

    second = prepare(fresh, None, bases=load_bases(tmp_path / "bases.safetensors"), **options)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert describe(second) == describe(first)
    train(fresh, second, BATCHES[3:])
    assert_equal(bits(fresh), bits(whole))
    assert_equal(bits(to_linears(fresh)), bits(to_linears(whole)))


def test_a_layer_that_is_no_part_of_a_model_has_its_own_way_out() -> None:
    layer = BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))
    with pytest.raises(UserError, match=r"the model is itself a BlockLinear: use what its to_linear\(\) returns"):
        to_linears(layer)


@pytest.mark.parametrize("how", ["a block", "one linear in a later prepare"])
def test_where_one_layer_no_longer_rotates_the_optimizer_does_for_all(how: str) -> None:
    """All weights of a layer kind are treated alike: none may be rotated twice, or not at all."""
    models = [bert(torch.float64) for _ in range(2)]
    optimizers = [prepare(model, BATCHES, density=DENSITY, lr=LR, calibration_steps=2) for model in models]
    if how == "a block":
        to_linears(models[0].bert.encoder.layer[0])
    else:
        name = "bert.encoder.layer.0.intermediate.dense"
        prepare(models[0], BATCHES, [name], DENSITY, calibration_steps=2, rotation_order="gradient")
    for batch in BATCHES:
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_a_wrapper_leaves_no_hook_on_the_model_within() -> None:
    model = bert()
    fast(model)
    assert len(model._forward_pre_hooks) == 1
    to_linears(nn.Sequential(model))
    assert not model._forward_pre_hooks
