"""A weight whose gradient an optimizer releases moves in every backward pass: nothing may calibrate on it meanwhile."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_bert import ToyBert
from toy_models import toy_batches

from sparsegrad import SparseGradAdamW, UserError, calibrate, find_mlp, prepare

BATCHES = toy_batches("bert", 3)


def released(model: ToyBert) -> SparseGradAdamW:
    """An optimizer that releases gradients, before its first step."""
    optimizer = prepare(model, BATCHES, calibration_steps=2, lr=1e-2)
    optimizer.release_gradients()
    return optimizer


def calibrated(model: ToyBert, _: Any) -> Any:
    return calibrate(model, BATCHES, {kind: found.values() for kind, found in find_mlp(model).items()}, steps=2)


AFTERWARDS: dict[str, Callable[[ToyBert, SparseGradAdamW], Any]] = {
    "calibrate": calibrated,
    "prepare": lambda model, _: prepare(model, BATCHES, calibration_steps=2),
    "prepare with bases": lambda model, optimizer: prepare(model, None, bases=optimizer.bases),
}


@pytest.mark.parametrize("how", AFTERWARDS)
def test_a_calibration_is_refused_until_the_optimizer_stops_releasing(small_bert: ToyBert, how: str) -> None:
    optimizer = released(small_bert)
    before = copy.deepcopy(small_bert.state_dict())
    with pytest.raises(UserError, match=r"moves in every backward pass.*stop_releasing\(\)"):
        AFTERWARDS[how](small_bert, optimizer)
    optimizer.stop_releasing()
    AFTERWARDS[how](small_bert, optimizer)
    assert all(torch.equal(before[name], now) for name, now in small_bert.state_dict().items())


def test_a_calibration_needs_no_stop_once_the_optimizer_is_gone(small_bert: ToyBert) -> None:
    optimizer = released(small_bert)
    before = copy.deepcopy(small_bert.state_dict())
    del optimizer
    gc.collect()
    calibrated(small_bert, None)
    assert all(torch.equal(before[name], now) for name, now in small_bert.state_dict().items())


def test_after_the_stop_a_step_moves_what_it_moved_before(small_bert: ToyBert) -> None:
    """In the middle of a training, and twice: the second stop does nothing."""
    small_bert.double()  # the key biases have no gradient but rounding, which Adam would enlarge in float32
    models = [small_bert, copy.deepcopy(small_bert)]
    bases = prepare(copy.deepcopy(small_bert), BATCHES, calibration_steps=2).bases
    optimizers = [prepare(model, None, bases=bases, lr=1e-2) for model in models]
    optimizers[0].release_gradients()
    for number, batch in enumerate(BATCHES):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
            released_now = model is small_bert and number == 0
            weight = model.bert.encoder.layer[0].intermediate.dense.weight
            assert (weight.grad is None) == released_now
            optimizer.zero_grad()
        optimizers[0].stop_releasing()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)  # released weights are rotated one by one, others together
