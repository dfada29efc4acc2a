"""`prepare(engine="fast")`: blocks in the places of the linears, made and trained as by hand, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fast_checks import BATCHES, DENSITY, LR, bert, blocks, fast, train
from model_states import bits, has_bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy_models import toy_model

from sparsegrad import Basis, UserError, calibrate, describe, find_mlp, prepare, to_linears
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import core_shape
from sparsegrad.layers.replace import replace_module

WHOLE = {"intermediate": Basis.identity(32, 16), "output": Basis.identity(16, 32)}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_blocks_and_the_optimizer_made_by_hand(fused: bool | None, weight_decay: float) -> None:
    """To the bit, against torch's own AdamW over blocks that were put in one by one."""
    one, other = bert(torch.float64), bert(torch.float64)
    optimizer = fast(one, fused=fused, weight_decay=weight_decay)
    linears = find_mlp(other)
    bases = calibrate(other, BATCHES, {kind: found.values() for kind, found in linears.items()}, steps=3)
    for kind, found in linears.items():
        for name, linear in found.items():
            core = core_shape(tuple(linear.weight.shape), DENSITY)
            replace_module(other, name, BlockLinear.from_linear(linear, bases[kind], core))
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    by_hand = torch.optim.AdamW(trained, lr=LR, weight_decay=weight_decay, fused=fused)
    train(one, optimizer)
    train(other, by_hand)
    assert has_bits(to_linears(one), bits(to_linears(other)))


@pytest.mark.parametrize("fused", [None, True])
def test_every_step_reaches_the_function(fused: bool | None) -> None:
    """A step merges the cores, once; fused steps are not counted by torch."""
    model = bert(torch.float64)
    optimizer = fast(model, fused=fused)
    for batch in BATCHES[:3]:
        model(**batch).loss.backward()
        before = [layer.merged.clone() for layer in blocks(model)]
        optimizer.step()
        versions = [layer.weight._version for layer in blocks(model)]
        model(**batch)
        assert [layer.weight._version for layer in blocks(model)] == versions
        assert all(layer.merged.equal(layer.core) for layer in blocks(model))
        assert not any(layer.merged.equal(was) for layer, was in zip(blocks(model), before, strict=True))


def test_only_cores_biases_and_the_rest_train_and_what_was_frozen_stays() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].output.dense.bias.requires_grad_(False)
    mlp = {f"{name}.weight" for found in find_mlp(model).values() for name in found}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = fast(model)
    model(**BATCHES[0]).loss.backward()
    cores = {name.removesuffix("weight") + "core" for name in mlp}
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == trained - mlp | cores
    named = dict(model.named_parameters())
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(named[name]) for name in touched)
    to_linears(model)
    assert not model.bert.encoder.layer[0].output.dense.bias.requires_grad


def test_weights_are_not_copied_and_layers_of_a_kind_share_their_basis() -> None:
    model = bert()
    old = {linear.weight.data_ptr() for found in find_mlp(model).values() for linear in found.values()}
    fast(model)
    assert {layer.weight.data_ptr() for layer in blocks(model)} == old
    assert len({layer.in_basis.data_ptr() for layer in blocks(model)}) == len(WHOLE)


def test_describe_tells_kind_weight_core_and_counts() -> None:
    model = bert()
    optimizer = fast(model)
    plan = describe(optimizer)
    assert [(group.kind, group.shape, group.core, group.kept) for group in plan.taken] == [
        ("intermediate", (32, 16), (10, 5), 50),
        ("output", (16, 32), (5, 10), 50),
    ]
    assert plan.taken[0].names[0] == "bert.encoder.layer.0.intermediate.dense.weight"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.trainable == trained
    table = str(plan).splitlines()
    assert table[0].split()[:4] == ["kind", "weights", "shape", "core"]
    assert " ".join(table[1].split()).startswith("intermediate 2 32 x 16 10 x 5 50 of 512 ")
    assert "core" not in str(describe(prepare(bert(), BATCHES, calibration_steps=3)))


@pytest.mark.parametrize("saved", ["exact", "fast"])
def test_the_state_of_the_other_engine_is_refused(saved: str) -> None:
    optimizers = {"exact": prepare(bert(), BATCHES, calibration_steps=3), "fast": fast(bert())}
    other = "fast" if saved == "exact" else "exact"
    message = f"saved state is of engine={saved}, this optimizer of engine={other}: make it with engine={saved}"
    with pytest.raises(UserError, match=message):
        optimizers[other].load_state_dict(optimizers[saved].state_dict())


def never() -> Any:
    raise AssertionError("a batch was read")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 9}, r'^engine="fast" does not take keep=9: density alone sets .*, or give engine="exact"$'),
        ({"sides": "small"}, r'^engine="fast" does not take sides=small: .* sides="both", moments="dense" are all'),
        ({"moments": "support"}, '^engine="fast" does not take moments=support: '),
        ({"keep": 9, "sides": "in", "moments": "support"}, "does not take keep=9, sides=in, moments=support: "),
        ({"engine": "layer"}, "engine=layer is not allowed: choose one of exact, fast"),
        ({"engine": "Fast"}, "engine=Fast is not allowed: choose one of exact, fast"),
        ({"density": 0}, "density=0"),
        (
            {"bases": {kind: basis.only("in") for kind, basis in WHOLE.items()}},
            r"does not have sides=both: name the side it has",
        ),
    ],
)
def test_what_it_does_not_take_is_named_before_any_batch_is_read(options: dict[str, Any], message: str) -> None:
    model = bert()
    modules = list(model.modules())
    with pytest.raises(UserError, match=message):
        prepare(model, never(), **{"engine": "fast", **options})
    assert list(model.modules()) == modules


def test_a_model_inside_ddp_is_refused_since_ddp_would_not_see_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module: nn.Module.__init__(self))
    wrapped = DistributedDataParallel(bert())
    wrapped.module = bert()
    with pytest.raises(UserError, match="which DistributedDataParallel does not see: prepare the model first and wrap"):
        prepare(wrapped, never(), engine="fast")


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_a_second_prepare_asks_for_linears_first(engine: str) -> None:
    model = bert()
    fast(model)
    message = r"is a BlockLinear already: call sparsegrad\.to_linears\(model\) first"
    with pytest.raises(UserError, match=message):
        prepare(model, never(), engine=engine)
    assert describe(prepare(to_linears(model), BATCHES, calibration_steps=3, engine=engine)).taken


def test_its_bases_are_asked_for_in_vain_but_with_the_way_to_them() -> None:
    with pytest.raises(UserError, match='engine="fast" keeps no whole bases: call calibrate first'):
        _ = fast(bert()).bases


def test_conv1d_is_refused_with_the_other_engine_as_remedy() -> None:
    with pytest.raises(UserError, match=r'^engine="fast" wraps nn\.Linear, not Conv1D: give engine="exact"$'):
        prepare(toy_model("gpt2"), never(), engine="fast")
