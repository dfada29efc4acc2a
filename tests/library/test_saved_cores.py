"""The state of engine `fast` belongs to the bases that its cores lie between."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, bert, fast, train
from torch import nn

from sparsegrad import Basis, SparseGradAdamW, UserError, calibrate, find_mlp


def bases_of(model: nn.Module) -> dict[str, Basis]:
    return calibrate(model, BATCHES, {kind: found.values() for kind, found in find_mlp(model).items()}, steps=3)


def flipped(bases: dict[str, Basis], kind: str) -> dict[str, Basis]:
    """The same directions, of which one of `kind` has the other sign, as another calibration may find it."""
    basis = bases[kind]
    assert basis.out_basis is not None
    out_basis = basis.out_basis.clone()
    out_basis[:, 1] *= -1
    return {**bases, kind: Basis(basis.in_basis, out_basis)}


def saved(optimizer: SparseGradAdamW) -> dict[str, Any]:
    """Its state after a round trip through a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    return state


def test_a_state_of_other_bases_is_refused_and_that_of_the_same_continues() -> None:
    model = bert()
    bases = bases_of(model)
    others = [copy.deepcopy(model) for _ in range(3)]
    optimizer = fast(model, bases=bases)
    train(model, optimizer)
    state = saved(optimizer)
    wrong = fast(others[0], bases=flipped(bases, "output"))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(UserError, match=r"other bases of kind output: give prepare .*bases=load_bases\(\.\.\.\)"):
        wrong.load_state_dict(state)
    assert wrong.state_dict() == before
    rounded = {kind: basis.to("cpu", torch.bfloat16).to("cpu", torch.float32) for kind, basis in bases.items()}
    for other, given in zip(others[1:], (bases, rounded), strict=True):
        fast(other, bases=given).load_state_dict(state)


def test_a_state_without_a_description_is_accepted_and_does_not_remove_it() -> None:
    optimizer = fast(bert())
    described = saved(optimizer)
    plain = copy.deepcopy(described)
    for group in plain["param_groups"]:
        group.pop("directions", None)
    optimizer.load_state_dict(plain)
    assert saved(optimizer)["param_groups"] == described["param_groups"]
    assert len(described["param_groups"][0]["directions"]) == 8
