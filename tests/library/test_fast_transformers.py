"""`prepare(engine="fast")` beside the method `sparsegrad_fast`, in the Trainer and under Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, DENSITY, LR, blocks, fast, train
from model_states import assert_equal, bits
from torch import nn

from sparsegrad import describe, find_mlp, to_linears

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from model_zoo import tiny_model
from transformers import Trainer, TrainingArguments

from sparsegrad.methods.base import Context
from sparsegrad.methods.sparsegrad_fast import SparseGradFast


def bert(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("bert", dtype)


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
