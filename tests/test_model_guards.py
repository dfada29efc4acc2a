"""What a model can be that the method does not fit, or fits only at second look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsegrad import Basis, SparseGradLinear, UserError, find_mlp
from sparsegrad.block import BlockLinear
from sparsegrad.grams import Grams
from sparsegrad.lean import LeanLinear


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc11": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)})


def test_a_linear_under_two_kinds_is_named_with_both() -> None:
    with pytest.raises(UserError, match=r"^fc1 is of two kinds, mlp\.a and mlp\.b: write patterns"):
        find_mlp(network(), {"a": "fc1", "b": "fc.*1"})
    found = find_mlp(network(), {"a": "fc1", "b": "fc11"})
    assert {kind: list(linears) for kind, linears in found.items()} == {"a": ["fc1"], "b": ["fc11"]}


def test_a_list_that_names_a_linear_twice_takes_it_once() -> None:
    assert {kind: list(linears) for kind, linears in find_mlp(network(), ["fc1", "fc1"]).items()} == {"fc1": ["fc1"]}


@pytest.mark.parametrize("sides", ["in", "out", "small"])
def test_the_layer_refuses_a_basis_of_one_side_when_it_is_made(sides: str) -> None:
    basis = Basis.identity(12, 8).only(sides)
    with pytest.raises(UserError, match="lacks a side: calibrate it with sides=both"):
        SparseGradLinear.from_linear(nn.Linear(8, 12), basis, keep=3)


@pytest.mark.parametrize("shape", [(8, 12), (8, 8)])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda conv, basis: SparseGradLinear.from_linear(conv, basis, keep=3), "engine layer wraps .*take the engine"),
        (lambda conv, basis: BlockLinear.from_linear(conv, basis, (2, 3)), "a block wraps .*take the engine merged"),
        (lambda conv, _: LeanLinear(conv, drop_padding=True), "a lean linear wraps .*leave drop_padding"),
    ],
)
def test_no_wrapper_takes_a_conv1d(shape: tuple[int, int], make: Callable[..., nn.Module], message: str) -> None:
    """Its weight is (in, out): a square one would be transposed in silence."""
    with pytest.raises(UserError, match=message) as caught:
        make(Conv1D(shape[1], shape[0]), Basis.identity(*shape))
    assert "nn.Linear, not Conv1D" in str(caught.value)


def test_gradients_of_several_devices_are_summed_where_the_first_was() -> None:
    """As `device_map` spreads the blocks of one kind. `meta` stands for a second device: it takes any tensor."""
    grams = Grams()
    grams.add(torch.ones(12, 8, device="meta"))
    grams.add(torch.ones(12, 8))
    assert grams.count == 2
    for gram in (grams.out_gram, grams.in_gram):
        assert gram is not None
        assert gram.device.type == "meta"


def test_a_given_device_stays_that_of_the_sums() -> None:
    grams = Grams(device="meta", sides="in")
    for device in ("cpu", "meta"):
        grams.add(torch.ones(12, 8, device=device))
    assert grams.in_gram is not None
    assert grams.in_gram.device.type == "meta"
