"""An adapter is loaded on its own base only, also where the training left the target weights as they were."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import changed, edit_facts, own_model
from torch import nn

from sparsegrad import UserError, load_adapter, save_adapter, save_lora
from sparsegrad.adapter.format import FACTS

TARGETS = {"only": "0"}


def head_only(folder: Path, base: nn.Sequential | None = None) -> nn.Module:
    base = own_model() if base is None else base
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[1].weight += 1  # type: ignore[operator]
    save_adapter(model, folder, base, target_modules=TARGETS)
    return model


def test_an_adapter_of_the_head_alone_is_refused_on_another_base(tmp_path: Path) -> None:
    model = head_only(tmp_path)
    fresh = own_model()
    load_adapter(fresh, tmp_path).merge()
    assert torch.equal(fresh[1].weight, model.get_parameter("1.weight"))
    with torch.no_grad():
        fresh[0].weight[0, 0] += 1
    with pytest.raises(UserError, match=r"0\.weight is not the base's"):
        load_adapter(fresh, tmp_path)
    with pytest.raises(UserError, match=r"the model has no 0\.weight, which the adapter expects"):
        load_adapter(nn.Sequential(nn.Identity(), nn.Linear(30, 3)), tmp_path)


def test_a_target_weight_that_stayed_may_be_wider(tmp_path: Path) -> None:
    """As after training beside bfloat16 weights: what changed is float32, and so may the whole base be."""
    base = own_model()
    base[0].bfloat16()
    head_only(tmp_path, base)
    load_adapter(base.float(), tmp_path).merge()


@pytest.mark.parametrize("layout", ["narrow", "packed", "renamed"])
def test_target_weights_that_stayed_and_cannot_be_compared_are_named(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a base in 4 bits: packed by bitsandbytes, or under another name by GPTQ."""
    model, fresh = head_only(tmp_path), own_model()
    if layout == "narrow":
        fresh[0].bfloat16()
    elif layout == "packed":
        fresh[0].weight = nn.Parameter(torch.zeros(600, 1, dtype=torch.uint8), requires_grad=False)
    else:
        del fresh[0].weight
        fresh[0].register_buffer("qweight", torch.zeros(5, dtype=torch.int32))
    load_adapter(fresh, tmp_path).merge()
    assert torch.equal(fresh[1].weight, model.get_parameter("1.weight"))
    assert "1 weights of the model, such as 0.weight, are quantized or less precise" in caplog.text


def test_a_target_weight_that_stayed_of_another_shape_is_refused(tmp_path: Path) -> None:
    head_only(tmp_path)
    fresh = own_model()
    fresh[0] = nn.Linear(41, fresh[0].out_features)
    with pytest.raises(UserError, match=r"0\.weight is \(\d+, 41\) .* in the model and \(\d+, 40\) .* in the adapter"):
        load_adapter(fresh, tmp_path)


def test_adapters_of_earlier_versions_are_loaded(tmp_path: Path) -> None:
    head_only(tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    del facts["stayed"]
    (tmp_path / FACTS).write_text(json.dumps(facts))
    load_adapter(own_model(), tmp_path)


@pytest.mark.parametrize("stayed", [[], {"0.weight": "x"}, {"0.weight": {"dtype": "text", "sha256": ""}}, None])
def test_a_damaged_list_is_refused(stayed: Any, tmp_path: Path) -> None:
    head_only(tmp_path)
    edit_facts(tmp_path, stayed=stayed)
    with pytest.raises(UserError, match="that stayed is inconsistent"):
        load_adapter(own_model(), tmp_path)


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    """As accelerate leaves those that it offloads."""
    head_only(tmp_path)
    base, model = own_model(), changed(own_model())
    with pytest.raises(UserError, match=r"0\.weight has no values .* without offloading"):
        load_adapter(own_model().to("meta"), tmp_path)
    with pytest.raises(UserError, match=r"0\.weight has no values"):
        save_adapter(copy.deepcopy(model).to("meta"), tmp_path / "new", base, target_modules=TARGETS)
    with pytest.raises(UserError, match=r"0\.weight of the base has no values"):
        save_lora(model, tmp_path / "new", copy.deepcopy(base).to("meta"), rank=2)
    assert not (tmp_path / "new").exists()


def test_shards_are_refused(tmp_path: Path) -> None:
    head_only(tmp_path)
    model = own_model()
    model[0].weight.device_mesh = None  # type: ignore[assignment]  # a shard is recognized by it
    with pytest.raises(UserError, match=r"0\.weight is cut into shards .* before fully_shard"):
        load_adapter(model, tmp_path)
