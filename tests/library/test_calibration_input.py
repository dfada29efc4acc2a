"""What calibration takes and leaves: linears by kind, several batches, stacks of gradients, and unchanged buffers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import UserError, calibrate, find_mlp, hosvd, prepare

NAMES = ["up", "down"]


class Normed(nn.Module):
    """Two linears around a BatchNorm, with a buffer that is assigned anew and one that cannot be written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("fixed", torch.zeros(1).expand(3))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen, self.cache = self.seen + x.mean(0), self.cache + 1
        return {"loss": self.down(self.norm(self.up(x)).relu()).square().mean()}


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))} for seed in range(count)]


@pytest.mark.parametrize("count", [2, 1])  # with one batch of two, calibration fails after a forward pass
def test_the_state_dict_is_the_same_after_calibration(count: int) -> None:
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = dict(model.named_buffers())
    if count == 2:
        prepare(model, batches(), NAMES, 0.1, calibration_steps=2)
    else:
        with pytest.raises(UserError, match="ran out of batches"):
            prepare(model, batches(1), NAMES, 0.1, calibration_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(buffer is tensors[name] for name, buffer in model.named_buffers() if name != "cache")
    assert model.cache == count  # no part of the state dict: the module may know what is in it


def test_calibration_that_trains_moves_the_statistics() -> None:
    model = Normed()
    calibrate(model, batches(), find_mlp(model, NAMES), 2, update=lambda: None)
    assert model.norm.num_batches_tracked == 2


def test_calibrate_takes_what_find_mlp_returns() -> None:
    model = Normed()
    found = calibrate(model, batches(), find_mlp(model, NAMES), 2)
    for kind, basis in calibrate(model, batches(), {"up": [model.up], "down": iter([model.down])}, 2).items():
        assert torch.equal(basis.in_basis, found[kind].in_basis)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: calibrate(model, batches(), NAMES, 2),
            "mlp is ['up', 'down']: give linears by layer kind, as "
            "calibrate(model, batches, find_mlp(model, ['up', 'down'])) does",
        ),
        (
            lambda model: calibrate(model, batches(), {"one": "up"}, 2),
            "mlp['one'] is 'up': give linears by layer kind, as "
            "calibrate(model, batches, find_mlp(model, {'one': 'up'})) does",
        ),
        (lambda model: calibrate(model, batches(), "llama", 2), "mlp is 'llama': give .*find_mlp(model, 'llama')"),
        (lambda model: calibrate(model, batches(), {}, 2), "mlp is empty: give .*find_mlp(model)"),
        (lambda model: calibrate(model, batches(), [model.up], 2), "mlp is [Linear(.*: give .*find_mlp(model)"),
        (lambda model: calibrate(model, batches(), {"up": model.up}, 2), "mlp['up'] is a Linear: .*[linear, ...]"),
        (lambda model: calibrate(model, batches(), None, 2), "mlp is None: give .*find_mlp(model)"),
        (lambda model: calibrate(model, batches(), {"up": []}, 2), "mlp['up'] is empty: give linears"),
        (lambda model: calibrate(model, batches(), {"up": [nn.ReLU()]}, 2), "an item of mlp['up'] is a ReLU: give"),
        (lambda model: calibrate(model, 5, find_mlp(model, NAMES)), "batches is 5: give a list of batches or a Data"),
        (lambda model: calibrate(model, batches()[0], find_mlp(model, NAMES)), "batches is one batch: give several"),
        (
            lambda model: prepare(model, 5, NAMES, 0.1),
            "batches is 5: give a list of batches or a DataLoader, and their number as calibration_steps=",
        ),
        (lambda _: hosvd(torch.ones(3, 4)), "gradients is a tensor (3, 4): give one tensor (steps, out, in)"),
        (lambda _: hosvd(torch.ones(3, 4), method="stacked"), "gradients is a tensor (3, 4): give"),
        (lambda _: hosvd(5), "gradients is 5: give one tensor (steps, out, in), or several (out, in)"),
        (lambda _: hosvd([torch.ones(3)]), "a gradient has shape (3,): give tensors (out, in)"),
        (lambda _: hosvd([[1.0]]), "a gradient is [1.0]: give tensors (out, in)"),
    ],
)
def test_bad_input_is_named_with_the_call_that_works(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        call(Normed())
