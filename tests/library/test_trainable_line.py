"""The line of what trains: counted from the model, whatever the engine and however much of the rest is frozen."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from toy_models import toy_batches, toy_model

from sparsegrad import UserError, describe, prepare, print_trainable_parameters


@pytest.mark.parametrize("engine", ["exact", "fast"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_line_adds_up_to_the_model(engine: str, frozen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = toy_model("bert", torch.float32)
    size = sum(parameter.numel() for parameter in model.parameters())
    if frozen:
        model.bert.embeddings.requires_grad_(False)
    mlp = {name: one for name, one in model.named_parameters() if "dense.weight" in name and "attention" not in name}
    mlp_size = sum(one.numel() for one in mlp.values())
    rest = sum(one.numel() for name, one in model.named_parameters() if name not in mlp and one.requires_grad)
    optimizer = prepare(model, toy_batches("bert", 2), calibration_steps=2, density=0.1, engine=engine)
    print_trainable_parameters(optimizer)
    kept = sum(
        group["params"][0].numel() if engine == "fast" else int(group["density"] * group["params"][0].numel())
        for group in optimizer.param_groups
        if group.get("kind")
        for _ in group["params"]
    )
    how = "as cores" if engine == "fast" else "in each step"
    assert capsys.readouterr().out == (
        f"trainable: target weights {kept:,} of {mlp_size:,} ({kept / mlp_size:.2%}) {how}; "
        f"rest {rest:,} of {size - mlp_size:,} ({rest / (size - mlp_size):.2%}); "
        f"together {kept + rest:,} of {size:,} ({(kept + rest) / size:.2%})\n"
    )
    total = f"trainable params: {kept + rest:,} || all params: {size:,} || trainable%: {(kept + rest) / size:.4%}"
    assert str(describe(optimizer)).endswith(total.removesuffix("%"))


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_what_is_frozen_or_added_later_counts_as_it_is(engine: str) -> None:
    model: Any = toy_model("bert", torch.float32)
    size = sum(parameter.numel() for parameter in model.parameters())
    optimizer = prepare(model, toy_batches("bert", 2), calibration_steps=2, density=0.1, engine=engine)
    before = describe(optimizer)
    model.requires_grad_(False)
    optimizer.param_groups[0]["params"][0].requires_grad_(True)
    model.adapter = torch.nn.Linear(3, 4)
    optimizer.add_param_group({"params": list(model.adapter.parameters())})
    plan = describe(optimizer)
    assert [(group.frozen, len(group.names)) for group in plan.taken] == [(1, 2), (2, 2)]
    assert (plan.kept, plan.rest, plan.mlp_size) == (before.taken[0].kept, 16, before.mlp_size)
    assert (before.model_size, plan.model_size) == (size, size + 16)
    assert "2 (1 frozen)" in str(plan)
    del model
    gc.collect()
    assert describe(optimizer).model_size == size  # as it was given


def test_a_model_is_refused_with_the_optimizer_as_remedy() -> None:
    with pytest.raises(UserError, match=r"Linear is a model: give the optimizer that sparsegrad\.prepare returned"):
        print_trainable_parameters(torch.nn.Linear(2, 2))


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"AdamW has no SparseGrad weights: give what sparsegrad\.prepare returned"):
        print_trainable_parameters(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
