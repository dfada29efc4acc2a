"""What a model can be that the method does not fit, or fits only at second look."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsegrad import UserError, find_mlp


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
