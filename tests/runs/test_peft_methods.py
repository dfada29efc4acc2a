"""Methods of peft and their kin: every YAML trains, merges and resumes, and trains the entries that it should."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_cases import KIN, READY, fresh, made, needs_lora_ga, prepared, train
from run_fixtures import Composer
from test_methods import batch, context
from torch import nn

from sparsegrad import find_mlp
from sparsegrad.methods.core import CoreLinear
from sparsegrad.methods.floors import BitFit, Frozen
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.methods.lora import Lora
from sparsegrad.methods.lora_sb import LoraSb
from sparsegrad.methods.lora_xs import LoraXs
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.peft_config import add_seed
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.static_mask import StaticMask
from sparsegrad.runs.announcement import describe_run_briefly
from sparsegrad.runs.config import build


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=needs_lora_ga if one == "lora_ga" else ()) for one in (*READY, *KIN)]
)
def test_every_method_trains_merges_and_resumes(conf: Composer, name: str) -> None:
    """Three steps, then the same by a second model that takes over after two: equal to the last bit."""
    method, model = made(conf, name), fresh()
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    result = prepared(method, model)
    train(model, result, range(2))
    saved = copy.deepcopy((model.state_dict(), result.optimizer.state_dict()))
    train(model, result, range(2, 3))
    torch.manual_seed(1)
    other = fresh()
    again = prepared(method, other)
    other.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    train(other, again, range(2, 3))
    assert all(torch.equal(one, other.state_dict()[key]) for key, one in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        before = model(**batch(9)).logits
        assert result.notes.get("merges", True), "all ready ones can be merged"
        result.finish()
        after = model(**batch(9)).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert set(model.state_dict()) == set(start), "an ordinary model again"
    kinds = find_mlp(model)
    moved = [
        not torch.equal(start[f"{key}.weight"], one.weight) for found in kinds.values() for key, one in found.items()
    ]
    assert all(moved) is (name not in ("bitfit", "frozen"))
    assert torch.equal(start["bert.embeddings.word_embeddings.weight"], model.bert.embeddings.word_embeddings.weight)


# What trains is in the model itself: nothing is merged into a linear, whose bias stays frozen.
UNMERGED = ("bitfit", "frozen", "static_mask", "random_mask", "sparsegrad_static")
LORAS: dict[str, Any] = {
    "lora": Lora(rank=2),
    "lora_bias": Peft(config={"peft_type": "LORA", "r": 2, "lora_bias": True}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=needs_lora_ga if one == "lora_ga" else ()) for one in (*LORAS, *READY, *KIN)]
)
def test_bfloat16_weights_keep_the_whole_change_when_it_is_merged(conf: Composer, name: str) -> None:
    """Most of a small change is below the last digit of bfloat16."""
    model = fresh()
    for linear in [one for found in find_mlp(model).values() for one in found.values()]:
        nn.init.normal_(linear.bias)  # some methods change it
    model.bfloat16()
    method = LORAS.get(name) or made(conf, name)
    with torch.autocast("cpu", torch.bfloat16):
        result = prepared(method, model, lr=1e-4)
        train(model, result, range(2))
    exact = copy.deepcopy(model).float().eval()
    result.finish()
    linears = [one for found in find_mlp(model).values() for one in found.values()]
    assert {one.weight.dtype for one in linears} == {torch.bfloat16 if name in ("bitfit", "frozen") else torch.float32}
    if name not in UNMERGED:  # also without autocast, as the bias has the dtype of the weight
        assert all(one(torch.zeros(1, one.in_features)).dtype == torch.float32 for one in linears)
    with torch.no_grad():
        torch.testing.assert_close(model.float().eval()(**batch(9)).logits, exact(**batch(9)).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [Lora(rank=2), LoraXs(rank=2, density=None), LoraSb(rank=2, density=None, steps=2)])
def test_a_change_that_is_merged_into_bfloat16_weights_has_its_rank(method: Any) -> None:
    model = fresh().bfloat16()
    before = {name: one.weight.double() for found in find_mlp(model).values() for name, one in found.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = prepared(method, model)
        train(model, result, range(3))
    result.finish()
    for name, weight in before.items():
        with torch.no_grad():
            values = torch.linalg.svdvals(model.get_submodule(name).weight.double() - weight)
        assert values[2] < 1e-3 * values[1]


@pytest.mark.parametrize("name", [pytest.param(one, marks=needs_lora_ga if one == "lora_ga" else ()) for one in READY])
def test_every_ready_method_starts_from_the_function_of_the_model(conf: Composer, name: str) -> None:
    plain, model = fresh().eval(), fresh()
    prepared(made(conf, name), model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch(9)).logits, plain(**batch(9)).logits, rtol=0, atol=1e-5)


def test_a_budget_gives_the_size_with_the_closest_count_and_says_it(conf: Composer) -> None:
    model = fresh()
    result = prepared(made(conf, "dora"), model)  # 0.1 of 512 entries: r 48 + rows of magnitudes
    about = result.notes["budget"]
    assert about["field"] == "r"
    assert about["value"] == 1
    assert about["share"] == pytest.approx((2 * 48 + 32 + 16) / 1024)
    assert result.trainable_per_weight == {"intermediate": 48 + 32, "output": 48 + 16}
    exact = prepared(Peft(config={"peft_type": "FOURIERFT"}, budget="density:0.05"), fresh())
    assert exact.trainable_per_weight == {"intermediate": 26, "output": 26}


def test_a_saved_adapter_is_peft_s_own(conf: Composer, tmp_path: Path) -> None:
    model, base = fresh(), fresh()
    result = prepared(made(conf, "shira"), model)
    train(model, result, range(2))
    assert result.save is not None
    result.save(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch(5)).logits, model.eval()(**batch(5)).logits, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert prepared(made(conf, "pissa"), fresh()).save is None, "it takes its part out of W"
    assert prepared(made(conf, "shira"), fresh(), train_rest=True).save is None, "the rest is in no adapter"


def test_the_seed_of_the_run_draws_what_is_drawn_once(conf: Composer) -> None:
    """In peft's own field, by whatever name; a given value is kept."""
    drawn = {}
    for seed in (1, 2):
        models = {name: fresh() for name in ("shira", "vera")}
        for name, model in models.items():
            prepared(made(conf, name, f"seed={seed}"), model)
        vera = models["vera"].bert.encoder.layer[0].output.dense.vera_A["default"].clone()
        drawn[seed] = [vera, models["shira"].bert.encoder.layer[0].output.dense.shira_indices["default"].clone()]
    assert not any(torch.equal(*pair) for pair in zip(*drawn.values(), strict=True))
    node = {"peft_type": "RANDLORA", "projection_prng_key": 5}
    assert add_seed(node, 1) == node
    assert add_seed({"peft_type": "LORA"}, 1) == {"peft_type": "LORA"}


def test_peft_s_fields_need_no_plus(conf: Composer) -> None:
    method = build(conf("method=peft", "method.config.peft_type=SHIRA", "method.config.r=8", "task=stsb")).method
    assert (method.name, dict(method.config)) == ("peft", {"peft_type": "SHIRA", "r": 8})


def test_a_type_in_small_letters_is_the_same_run(conf: Composer) -> None:
    small, large = (build(conf("method=peft", f"method.config.peft_type={name}")) for name in ("shira", "SHIRA"))
    assert small.key == large.key
    assert "/ peft SHIRA / snippets" in describe_run_briefly(small)


def test_a_core_lies_between_the_singular_vectors_of_its_weight() -> None:
    model, plain = fresh(), fresh()
    prepared(LoraXs(rank=3, density=None), model)
    layer, weight = model.bert.encoder.layer[0].output.dense, plain.bert.encoder.layer[0].output.dense.weight
    assert isinstance(layer, CoreLinear)
    U, S, Vh = torch.linalg.svd(weight.detach())
    assert torch.allclose(layer.B @ layer.A, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5)
    assert layer.core.shape == (3, 3)
    assert layer.core.abs().max() < 1e-3


def test_a_core_of_lora_sb_starts_at_the_best_low_rank_part_of_adams_first_step() -> None:
    model, plain = fresh(), fresh()
    name = "bert.encoder.layer.1.intermediate.dense"
    step = -1e-3 * mean_gradients(plain, find_mlp(plain), context(), 2)[name].sign()
    prepared(LoraSb(rank=4, density=None, steps=2), model)
    layer: Any = model.get_submodule(name)
    U, S, Vh = torch.linalg.svd(step)
    assert torch.allclose(layer.B @ layer.core @ layer.A, (U[:, :4] * S[:4] @ Vh[:4]), atol=1e-6)


@pytest.mark.parametrize(
    "method", [StaticMask(keep=20, density=None, steps=2), SparseGrad(keep=20, density=None, steps=2, static=True)]
)
def test_a_fixed_choice_of_entries_is_that_of_the_calibration(method: Any) -> None:
    """Only the chosen entries move, of W or of V^T W U; the moments are of these alone."""
    model, plain = fresh(), fresh()
    result = prepared(method, model)
    result.optimizer.load_state_dict(result.optimizer.state_dict())  # as accelerate does before the first step
    basis = result.optimizer.param_groups[0]["basis"]
    rotate = (lambda gradient: gradient) if basis is None else basis.rotate
    squares = mean_gradients(plain, find_mlp(plain), context(), 2, lambda kind, gradient: rotate(gradient).square()
                             if kind == "intermediate" else gradient)  # fmt: skip
    name = "bert.encoder.layer.0.intermediate.dense"
    wanted = squares[name].flatten().topk(20).indices.sort().values
    train(model, result, range(5, 8))
    change = rotate((model.get_submodule(name).weight - plain.get_submodule(name).weight).detach()).flatten()
    assert change.abs().topk(20).indices.sort().values.tolist() == wanted.tolist()
    assert change.abs().sort().values[:-20].max() < 1e-6
    state = next(one for key, one in result.optimizer.state.items() if key is model.get_submodule(name).weight)
    assert state["exp_avg"].numel() == 20


def test_random_masks_differ_between_weights_of_a_shape() -> None:
    result = prepared(StaticMask(density=0.1, choice="random"), fresh())
    chosen = [state["positions"] for state in result.optimizer.state.values() if "positions" in state]
    assert len({tuple(one.tolist()) for one in chosen}) == len(chosen) == 4


def test_the_floors_train_the_head_and_the_biases() -> None:
    for method, wanted in ((Frozen(), 2), (BitFit(), 2)):
        model = fresh()
        result = prepared(method, model, train_rest=True)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in names if not name.endswith("bias")} == {"classifier.weight"}
        assert (len(names) == wanted) is isinstance(method, Frozen)
        assert set(result.trainable_per_weight.values()) == {0}


def test_bases_by_name() -> None:
    """`none` keeps entries of the plain gradient, `authors` transposes U, `random` is orthogonal."""
    found = {
        name: prepared(SparseGrad(keep=9, density=None, steps=2, basis=name), fresh())
        for name in ("hosvd", "authors", "random", "none")
    }
    bases = {name: one.optimizer.param_groups[0]["basis"] for name, one in found.items()}
    assert torch.equal(bases["authors"].in_basis, bases["hosvd"].in_basis.T)
    assert torch.equal(bases["none"].in_basis, torch.eye(16))
    U = bases["random"].in_basis
    assert torch.allclose(U.T @ U, torch.eye(16), atol=1e-5)
    assert not torch.allclose(U, bases["hosvd"].in_basis, atol=0.1)
