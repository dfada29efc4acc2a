"""What a peft method is said to train is what trains, and the size that a budget gives is one that trains well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_cases import fresh, prepared
from test_methods import batch

from sparsegrad import UserError, find_mlp
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.peft_config import list_types
from sparsegrad.methods.peft_size import Weight, describe_weights, fit_budget

MINILM = {"intermediate": Weight(1536, 384, True, 6), "output": Weight(384, 1536, True, 6)}
SMALL = {"intermediate": Weight(96, 48, True, 1), "output": Weight(48, 96, True, 1)}
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["output.dense"], "target_modules_bd_b": ["intermediate.dense"]}


def only_with(kind: str) -> Any:
    return pytest.mark.skipif(kind not in list_types(), reason="of a later peft")


def count_adapters(model: Any) -> int:
    named = model.named_parameters()
    return sum(one.numel() for name, one in named if one.requires_grad and not name.startswith("classifier"))


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LORA", "r": 2, "rank_pattern": {"output.dense": 4}},
        {"peft_type": "LORA", "r": 2, "rank_pattern": {"layer.1.output.dense": 4}},
        {"peft_type": "FOURIERFT", "n_frequency": 20, "n_frequency_pattern": {"intermediate.dense": 50}},
        {"peft_type": "OSF", "effective_rank": 12, "rank_pattern": {"layer.0": 14}},
        {"peft_type": "IA3", "feedforward_modules": ["bert.encoder.layer.0.intermediate.dense"]},
        pytest.param(
            {"peft_type": "LORA", "r": 2, "use_bdlora": BLOCKS},
            marks=pytest.mark.skipif("use_bdlora" not in LoraConfig.__dataclass_fields__, reason="of a later peft"),
        ),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_fields_that_look_at_names_count_as_they_train(fields: dict[str, Any]) -> None:
    model, method = fresh(), Peft(config=fields)
    said = method.count_added(find_mlp(model))
    result = prepared(method, model)
    assert said == count_adapters(model) == 2 * sum(result.trainable_per_weight.values())


@only_with("ADAMSS")
def test_the_share_of_a_method_that_looks_at_the_weights_is_the_one_that_trains() -> None:
    fields = {"peft_type": "ADAMSS", "use_dynamic_rank": True, "subspace_rank": 3}
    model = fresh()
    planned = fit_budget(fields, describe_weights(find_mlp(model)), 0.2)["share"]
    result = prepared(Peft(config=fields, budget="density:0.2"), model)
    share = round(count_adapters(model) / 2048, 6)
    assert share != planned
    assert result.notes["budget"]["share"] == share


def test_a_share_that_leaves_the_budget_only_with_the_real_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"field": "r", "value": 4, "share": 0.1}
    monkeypatch.setattr("sparsegrad.methods.peft._fit_once", lambda *_: found)
    with pytest.raises(UserError, match=r"with r=4 the share is 0\.38 of these weights; set it to null"):
        prepared(Peft(config={"peft_type": "LORA"}, budget="density:0.1"), fresh())


def test_a_budget_gives_no_blocks_of_one_entry_which_train_nothing() -> None:
    """Their Cayley transform is constant. A block of 1 would be closer: 0.094."""
    model = fresh()
    result = prepared(Peft(config={"peft_type": "BOFT"}, budget="density:0.08"), model)
    assert result.notes["budget"] == {"field": "boft_block_size", "value": 2, "share": 0.140625}
    model(**batch(9)).loss.backward()
    assert model.bert.encoder.layer[0].output.dense.boft_R["default"].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "density"),
    [({"peft_type": "HRA"}, 0.13), ({"peft_type": "LORA", "init_lora_weights": "orthogonal"}, 0.26)],
    ids=["HRA", "orthogonal"],
)
def test_a_budget_gives_an_even_rank_where_peft_needs_pairs(fields: dict[str, Any], density: float) -> None:
    """A rank of 3 would be closer; HRA would then start at another function, and LoRA not at all."""
    plain, model = fresh().eval(), fresh()
    result = prepared(Peft(config=fields, budget=f"density:{density}"), model)
    assert result.notes["budget"]["value"] == 2
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch(9)).logits, plain(**batch(9)).logits, rtol=0, atol=1e-5)


@pytest.mark.skipif("GRALORA" not in list_types(), reason="of peft 0.19")
def test_a_budget_gives_a_rank_that_the_blocks_of_gralora_divide() -> None:
    fields = {"peft_type": "GRALORA", "gralora_k": 3}
    assert fit_budget(fields, SMALL, 0.1) == {"field": "r", "value": 3, "share": 0.09375}


@pytest.mark.parametrize(
    ("kind", "weights", "density", "value", "share"),
    [
        ("C3A", MINILM, 0.002, 384, 0.002604),
        ("LOKR", SMALL, 0.05, 5, 0.032118),
        ("RANDLORA", SMALL, 0.015, 48, 0.020833),
    ],
)
def test_a_budget_is_searched_beyond_a_size_that_is_refused_or_no_closer(
    kind: str, weights: dict[str, Weight], density: float, value: int, share: float
) -> None:
    found = fit_budget({"peft_type": kind}, weights, density)
    assert (found["value"], found["share"]) == (value, share)


def test_the_smallest_share_is_that_of_the_largest_block() -> None:
    with pytest.raises(UserError, match=r"smallest share of C3A is 0\.0026, with block_size=384; give at least"):
        fit_budget({"peft_type": "C3A"}, MINILM, 0.001)
    with pytest.raises(UserError, match=r"smallest share of RANDLORA is 0\.021, with r=48; give at least"):
        fit_budget({"peft_type": "RANDLORA"}, SMALL, 0.01)


@only_with("OSF")
def test_the_rank_of_a_method_that_trains_what_is_left_of_the_ranks() -> None:
    found = fit_budget({"peft_type": "OSF"}, SMALL, 0.06)
    assert (found["value"], found["share"]) == (46, 0.062934)


@only_with("SUPERTUNING")
def test_a_budget_sets_a_sparsity() -> None:
    result = prepared(Peft(config={"peft_type": "SUPERTUNING"}, budget="density:0.1"), fresh())
    assert result.notes["budget"] == {"field": "sparsity", "value": 0.9, "share": 0.099609}
    assert result.trainable_per_weight == {"intermediate": 51, "output": 51}
    with pytest.raises(UserError, match=r"smallest share of SUPERTUNING is 0\.00022.*give at least"):
        fit_budget({"peft_type": "SUPERTUNING"}, SMALL, 0.0001)


@only_with("FROD")
def test_a_budget_for_a_size_that_is_set_by_hand_names_its_field() -> None:
    with pytest.raises(UserError, match=r"of FROD is set by method\.config\.sparse_rate \(.*sparse_rate by hand$"):
        fit_budget({"peft_type": "FROD"}, SMALL, 0.01)
    diagonals, tenths = 16 + 32, 25 + 102  # of the squares 16 x 16 and 32 x 32
    assert Peft(config={"peft_type": "FROD", "sparse_rate": 0.1}).count_added(find_mlp(fresh())) == 2 * (
        diagonals + tenths
    )
