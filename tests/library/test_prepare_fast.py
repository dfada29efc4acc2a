"""`prepare(engine="fast")` is the method `sparsegrad_fast` for a loop of one's own; `to_linears` takes it out again."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_batches, tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from sparsegrad import (
    Basis,
    SparseGradAdamW,
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
from sparsegrad.methods.base import Context
from sparsegrad.methods.sparsegrad_fast import SparseGradFast

LR, DENSITY = 1e-2, 0.1
BATCHES = tiny_batches("bert", 6)
WHOLE = {"intermediate": Basis.identity(32, 16), "output": Basis.identity(16, 32)}


def bert(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("bert", dtype)


def fast(model: nn.Module, **options: Any) -> SparseGradAdamW:
    return prepare(model, BATCHES, lr=LR, steps=3, engine="fast", **{"density": DENSITY, **options})


def train(model: Any, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]] = BATCHES) -> None:
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def blocks(model: nn.Module) -> list[BlockLinear]:
    return [module for module in model.modules() if isinstance(module, BlockLinear)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def context(weight_decay: float) -> Context:
    return Context(
        lr=LR,
        weight_decay=weight_decay,
        train_rest=True,
        is_head=lambda name: "classifier" in name,
        batches=lambda: iter(BATCHES),
        calibrated=lambda _, compute: (compute(), {}),
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("fused", [None, True])
def test_it_walks_the_path_of_the_method(fused: bool | None, weight_decay: float) -> None:
    """Fused to the bit; else to rounding, for the method's AdamW is fused."""
    mine, theirs = bert(torch.float64), bert(torch.float64)
    optimizer = fast(mine, fused=fused, weight_decay=weight_decay)
    method = SparseGradFast(density=DENSITY, steps=3)
    train(theirs, method.prepare(theirs, find_mlp(theirs), context(weight_decay)).optimizer)
    train(mine, optimizer)
    one, other = bits(to_linears(mine)), bits(to_linears(theirs))
    assert one.keys() == other.keys() == bits(bert()).keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if fused else torch.allclose(value, other[name], atol=1e-12), name


@pytest.mark.parametrize("fused", [None, True])
def test_every_step_reaches_the_function(fused: bool | None) -> None:
    """A layer merges its core when it sees it written, and fused steps are not counted by torch."""
    model = bert(torch.float64)
    optimizer = fast(model, fused=fused)
    for batch in BATCHES[:3]:
        model(**batch).loss.backward()
        optimizer.step()
        before = [layer.merged.clone() for layer in blocks(model)]
        model(**batch)
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


def test_the_old_weights_are_gone_and_layers_of_a_kind_share_their_basis() -> None:
    model = bert()
    old = [weakref.ref(linear.weight) for found in find_mlp(model).values() for linear in found.values()]
    fast(model)
    gc.collect()
    assert not any(weight() is not None for weight in old)
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
    assert "core" not in str(describe(prepare(bert(), BATCHES, steps=3)))


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
    """No forward pass came after it, so the layer has not merged it."""
    model = bert(torch.float64)
    train(model, fast(model, fused=True), BATCHES[:2])
    other = copy.deepcopy(model)
    to_linears(model)
    assert torch.allclose(other(**BATCHES[0]).logits, model(**BATCHES[0]).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_copy_made_between_a_step_and_its_merge_has_the_step(steps: int) -> None:
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


@pytest.mark.parametrize("saved", ["exact", "fast"])
def test_the_state_of_the_other_engine_is_refused(saved: str) -> None:
    optimizers = {"exact": prepare(bert(), BATCHES, steps=3), "fast": fast(bert())}
    other = "fast" if saved == "exact" else "exact"
    message = f"saved state is of engine={saved}, this optimizer of engine={other}: make it with engine={saved}"
    with pytest.raises(UserError, match=message):
        optimizers[other].load_state_dict(optimizers[saved].state_dict())


def test_it_trains_in_the_trainer_as_in_a_plain_loop(tmp_path: Path) -> None:
    """With a schedule and clipping of the Trainer's own; its checkpoint is read back."""
    rows = [{name: values[row] for name, values in BATCHES[0].items()} for row in range(4)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    plain, trained = (without_dropout(bert(torch.float64)) for _ in range(2))
    one, other = fast(plain), fast(trained)
    schedule = torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.0, total_iters=4)
    for _ in range(4):
        plain(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        one.step()
        schedule.step()
        one.zero_grad()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, max_grad_norm=0.1, report_to="none",
        use_cpu=True, save_steps=2,
    )  # fmt: skip
    trainer = Trainer(model=trained, args=arguments, train_dataset=rows)
    trainer.optimizer = other
    trainer.train()
    for name, weight in plain.state_dict().items():
        assert torch.allclose(weight, trained.state_dict()[name], atol=1e-9), name
    assert all(layer.core.detach().abs().max() > 0 for layer in blocks(trained))
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    fast(bert(torch.float64)).load_state_dict(state)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_accelerate_accumulates_into_the_cores() -> None:
    from accelerate import Accelerator

    plain, model = bert(), bert()
    one, other = fast(plain), fast(model)
    accelerator = Accelerator(cpu=True)
    model, other = accelerator.prepare(model, other)
    for number, batch in enumerate(BATCHES):
        (plain(**batch).loss / 2).backward()
        accelerator.backward(model(**batch).loss / 2)
        if number % 2:
            for optimizer in (one, other):
                optimizer.step()
                optimizer.zero_grad()
    assert describe(other) == describe(one)
    assert_equal(bits(plain), bits(accelerator.unwrap_model(model)))


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
            r"has not sides=both: name the side it has, or calibrate anew",
        ),
    ],
)
def test_what_it_does_not_take_is_named_before_any_batch_is_read(options: dict[str, Any], message: str) -> None:
    model = bert()
    modules = list(model.modules())
    with pytest.raises(UserError, match=message):
        prepare(model, never(), **{"engine": "fast", **options})
    assert list(model.modules()) == modules


def test_conv1d_is_refused_with_the_other_engine_as_remedy() -> None:
    with pytest.raises(UserError, match=r'^engine="fast" wraps nn\.Linear, not Conv1D: give engine="exact"$'):
        prepare(tiny_model("gpt2"), never(), engine="fast")


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
    assert describe(prepare(to_linears(model), BATCHES, steps=3, engine=engine)).taken


def test_its_bases_are_asked_for_in_vain_but_with_the_way_to_them() -> None:
    with pytest.raises(UserError, match='engine="fast" keeps no whole bases: call calibrate first'):
        _ = fast(bert()).bases


def test_a_layer_that_is_no_part_of_a_model_has_its_own_way_out() -> None:
    layer = BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))
    with pytest.raises(UserError, match=r"the model is itself a BlockLinear: take what its to_linear\(\) gives"):
        to_linears(layer)
