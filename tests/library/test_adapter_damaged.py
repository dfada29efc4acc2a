"""Damaged adapters are refused: never a crash, and never a model that is neither the base nor the trained one."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import Prepared, edit_facts, edit_tensors, train
from model_states import bits, has_bits
from torch import nn
from toy_models import toy_batches, toy_model

from sparsegrad import UserError, load_adapter, save_adapter
from sparsegrad.adapter.format import FACTS, TENSORS

BATCHES = toy_batches("bert", 4)
Trained = tuple[nn.Module, nn.Module, Any]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Base, trained model and optimizer; not to be changed."""
    base = toy_model("bert", torch.float32)
    model = copy.deepcopy(base)
    return base, model, train(model, BATCHES)


@pytest.fixture
def saved(trained: Trained, tmp_path: Path) -> Path:
    base, model, optimizer = trained
    save_adapter(model, tmp_path / "adapter", base, optimizer)
    return tmp_path / "adapter"


HEAD = "classifier.weight::values"


def refused(model: nn.Module, folder: Path, message: str) -> None:
    before = bits(model)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert has_bits(model, before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / FACTS).unlink(), "no adapter in"),
        (lambda f: (f / TENSORS).unlink(), "no adapter in"),
        (lambda f: (f / FACTS).write_text("{"), "not a readable adapter"),
        (lambda f: (f / FACTS).write_text("[]"), "not a readable adapter"),
        (lambda f: edit_facts(f, format="sparsegrad-adapter-0"), "format sparsegrad-adapter-0, not sparsegrad-adapter"),
        (lambda f: edit_facts(f, tensors={"../../x": {}}), "not a readable adapter"),
        (lambda f: edit_facts(f, tensors={}), "tensors that .* does not name"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "is damaged"),
        (lambda f: (f / TENSORS).write_bytes(b"\x80\x04cos\nsystem\n."), "is damaged"),
        (lambda f: edit_tensors(f, lambda t: t[HEAD].fill_(float("nan"))), "not finite"),
        (lambda f: edit_tensors(f, lambda t: t.update({HEAD: t[HEAD][:-1]})), "do not fit"),
        (lambda f: edit_tensors(f, lambda t: t.update({HEAD: t[HEAD].half()})), "inconsistent"),
        (lambda f: edit_tensors(f, lambda t: t.update({"more": t[HEAD].clone()})), "does not name"),
    ],
)
def test_spoiled_files_are_refused(trained: Trained, saved: Path, spoil: Any, message: str) -> None:
    spoil(saved)
    refused(copy.deepcopy(trained[0]), saved, message)


@pytest.mark.parametrize("index", [[3, 2], [-1, 4], [0, 10**6], [1, 1]])
def test_positions_outside_or_twice_are_refused(tmp_path: Path, index: list[int]) -> None:
    base = nn.Linear(40, 30)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[0, :2] += 1
    save_adapter(model, tmp_path, base, Prepared(model.weight, "weight", keep=700))
    edit_tensors(tmp_path, lambda t: t.update({"weight::index": torch.tensor(index, dtype=torch.int32)}))
    refused(base, tmp_path, "positions or values that do not fit")


def test_flipped_and_missing_bytes_never_pass_and_never_crash(trained: Trained, saved: Path) -> None:
    """200 spoiled folders; a flip in the JSON may leave it valid, but then the model is the trained one or refused."""
    generator = torch.Generator().manual_seed(0)
    originals = {name: (saved / name).read_bytes() for name in (FACTS, TENSORS)}
    before, seen = bits(trained[0]), Counter[str]()
    for number in range(200):
        name = (FACTS, TENSORS)[number % 2]
        content = bytearray(originals[name])
        place = int(torch.randint(len(content), (1,), generator=generator))
        content[place] ^= 1 << number % 8
        (saved / name).write_bytes(content if number % 3 else content[:place])
        try:
            adapter = load_adapter(trained[0], saved)
        except UserError:
            seen["refused"] += 1
            assert has_bits(trained[0], before)
        else:
            seen["loaded"] += 1
            adapter.merge()
            assert has_bits(trained[0], bits(trained[1]))
            adapter.unmerge()
        (saved / name).write_bytes(originals[name])
    assert min(seen["refused"], seen["loaded"]) > 0
