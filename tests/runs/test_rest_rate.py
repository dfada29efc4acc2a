"""`train.rest_lr`: which parameters of each method train at a rate of their own, and which keep `train.lr`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_cases import needs_lora_ga
from run_fixtures import Tiny
from torch import nn

from sparsegrad.optim.rest import set_rest_rate
from sparsegrad.runs import runner

# Methods of conf/experiment/compare.yaml, which trains the head at a rate of its own.
COMPARED = [
    "lora_tuned", "meprop", "sparsegrad", "sparsegrad_small", "sparsegrad_fast", "sparsegrad_static", "static_mask",
    "random_mask", "lora_xs", "lora_sb", "peft/dora", "peft/pissa", "peft/ia3", "peft/shira",
    pytest.param("peft/lora_ga", marks=needs_lora_ga),
]  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "meprop", "sparsegrad", "sparsegrad_fast"])
def test_the_rest_has_a_rate_of_its_own(tiny: Tiny, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = find_rates(tiny(f"method={method}", "train.rest_lr=1e-4"), monkeypatch)
    outside = {name: rate for name, rate in rates.items() if "embeddings" in name or "classifier" in name}
    ends = (".dense.weight", "core", "lora_A.default.weight")
    inside = {name: rate for name, rate in rates.items() if name.endswith(ends)}
    mlp = {name: rate for name, rate in inside.items() if "attention" not in name and "pooler" not in name}
    assert outside
    assert set(outside.values()) == {1e-4}
    assert mlp
    assert set(mlp.values()) == {1e-2}


@pytest.mark.parametrize("method", COMPARED)
def test_where_only_the_head_trains_beside_them_the_rate_is_its_alone(
    tiny: Tiny, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["method.budget=density:0.1"] if method.startswith("peft/") and method != "peft/ia3" else []
    config = tiny(f"method={method}", "train.train_rest=false", "train.rest_lr=1e-4", *size)
    rates = find_rates(config, monkeypatch)
    heads = {name: rate for name, rate in rates.items() if is_head(name)}
    others = {name: rate for name, rate in rates.items() if not is_head(name)}
    assert heads
    assert set(heads.values()) == {1e-4}
    assert others
    assert set(others.values()) == {1e-2}


def test_the_biases_of_bitfit_keep_the_rate_of_the_method(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = find_rates(tiny("method=bitfit", "train.rest_lr=1e-4"), monkeypatch)
    assert {rate for name, rate in rates.items() if is_head(name)} == {1e-4}
    assert {rate for name, rate in rates.items() if not is_head(name)} == {1e-2}


def test_a_split_group_keeps_its_settings() -> None:
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([a, b], lr=1e-2, weight_decay=0.5)
    set_rest_rate(optimizer, {id(b)}, 1e-4)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (1e-2, 0.5, 1), (1e-4, 0.5, 1)
    ]  # fmt: skip


class PreparedError(Exception):
    """Ends a run when its method is prepared: its rates are known then."""


def find_rates(config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Parameter that trains -> its learning rate at the start of a run."""
    rates: dict[str, float] = {}

    def spy(config: Any, model: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any, **more: Any) -> Any:
        by_id = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        rates.update({name: by_id[id(one)] for name, one in model.named_parameters() if id(one) in by_id})
        raise PreparedError

    monkeypatch.setattr(runner, "make_trainer", spy)
    with pytest.raises(PreparedError):
        runner.run(config)
    return rates


def is_head(name: str) -> bool:
    return "classifier" in name
