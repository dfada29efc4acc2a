"""The line of what trains: counted from the model, whatever the engine and however much of the rest is frozen."""

from __future__ import annotations

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


def test_a_model_is_refused_with_the_optimizer_as_remedy() -> None:
    with pytest.raises(UserError, match=r"Linear is a model: give the optimizer that sparsegrad\.prepare returned"):
        print_trainable_parameters(torch.nn.Linear(2, 2))


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"AdamW has no SparseGrad weights: give what sparsegrad\.prepare returned"):
        print_trainable_parameters(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
