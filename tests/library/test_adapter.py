"""Adapters: bit-equal both ways, switched, and refused where they do not belong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import Prepared, check_merge_and_unmerge, check_tolerance, train
from model_states import bits, has_bits
from torch import nn
from toy_models import TOYS, toy_batches, toy_model

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", TOYS)
def test_merge_gives_the_trained_model_and_unmerge_the_base_bit_for_bit(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_merge_and_unmerge(toy_model(layout, dtype), toy_batches(layout, 4), tmp_path)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_with_a_tolerance_kept_entries_are_stored_and_keep_their_promise(layout: str, tmp_path: Path) -> None:
    check_tolerance(toy_model(layout, torch.float32), toy_batches(layout, 4), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "is_rotated"),
    [
        (torch.float64, 1e-3, True),
        (torch.float64, 1e-5, True),
        (torch.float64, 1e-9, False),  # entries are stored in float32
        (torch.float32, 1e-3, True),
        (torch.bfloat16, 0.5, True),  # the merged weight is rounded by more than what was dropped
        (torch.bfloat16, 0.9, True),
        (torch.bfloat16, 1e-3, False),
    ],
)
def test_the_promise_of_a_tolerance_holds_for_every_dtype(
    dtype: torch.dtype, tolerance: float, is_rotated: bool, tmp_path: Path
) -> None:
    base = toy_model("llama", dtype)
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = train(model, toy_batches("llama", 4), steps=2, keep=4)
    saved = save_adapter(model, tmp_path, base, optimizer, tolerance=tolerance)
    assert ("rotated" in saved.forms) == is_rotated
    load_adapter(fresh, tmp_path).merge()
    for states in zip(fresh.parameters(), model.parameters(), base.parameters(), strict=True):
        found, wanted, old = (one.double() for one in states)
        assert (found - wanted).norm() <= tolerance * (wanted - old).norm()


def test_with_a_tolerance_a_kind_that_did_not_change_is_left_out(tmp_path: Path) -> None:
    base = toy_model("llama", torch.float32)
    model = copy.deepcopy(base)
    optimizer = train(model, toy_batches("llama", 4), steps=2, keep=4)
    names = optimizer.param_groups[0]["param_names"]
    for name in names:
        model.get_parameter(name).data.copy_(base.get_parameter(name))
    save_adapter(model, tmp_path, base, optimizer, tolerance=1e-3)
    assert not set(names) & set(json.loads((tmp_path / FACTS).read_text())["tensors"])


def test_an_adapter_prints_where_it_is_from_and_whether_it_is_merged(trained: Trained, saved: Path) -> None:
    adapter = load_adapter(copy.deepcopy(trained[0]), saved)
    assert repr(adapter).startswith(f"Adapter({str(saved)!r}, base='ToyBert', ")
    assert repr(adapter).endswith(" tensors, not merged)")


def test_only_changed_tensors_are_stored(tmp_path: Path) -> None:
    base = toy_model("bert", torch.float32)
    model: Any = copy.deepcopy(base)
    model.bert.embeddings.requires_grad_(False)
    train(model, BATCHES)
    save_adapter(model, tmp_path, base)
    names = json.loads((tmp_path / FACTS).read_text())["tensors"]
    assert names
    assert not any("embeddings" in name for name in names)


def test_a_sparse_change_is_stored_sparse(tmp_path: Path) -> None:
    base = nn.Linear(400, 300)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[5, ::2] += 1
    saved = save_adapter(model, tmp_path, base, Prepared(model.weight, "weight", keep=700))
    assert saved.forms == {"sparse": 1}
    assert saved.mlp_bytes == 200 * (4 + 4)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path).merge()
    assert has_bits(fresh, bits(model))


def test_the_card_says_what_it_is(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sparsegrad\n")
    assert "kB (LoRA of the same count: 0." in card
    assert "bit for bit" in card


def refused(model: nn.Module, folder: Path, message: str) -> None:
    before = bits(model)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert has_bits(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: toy_model("bert", torch.float32, seed=9), "is not the base's that this adapter was made for"),
        (lambda: toy_model("bert", torch.bfloat16), r"torch\.bfloat16 in the model .* torch\.float32 in the adapter"),
        (lambda: toy_model("llama", torch.float32), "the model has no bert"),
    ],
)
def test_another_model_is_refused(saved: Path, model: Any, message: str) -> None:
    refused(model(), saved, message)


def test_merge_twice_and_out_of_order_is_refused(trained: Trained, saved: Path) -> None:
    fresh: Any = copy.deepcopy(trained[0])
    one, two = load_adapter(fresh, saved), load_adapter(fresh, saved)
    with pytest.raises(UserError, match="nothing to unmerge"):
        one.unmerge()
    one.merge()
    with pytest.raises(UserError, match="this adapter is merged already"):
        one.merge()
    with pytest.raises(UserError, match="is merged already: unmerge it first, or call"):
        two.merge()
    assert has_bits(fresh, bits(trained[1]))


def test_training_while_merged_or_loaded_is_noticed(trained: Trained, saved: Path) -> None:
    fresh: Any = copy.deepcopy(trained[0])
    adapter = load_adapter(fresh, saved)
    adapter.merge()
    with torch.no_grad():
        fresh.classifier.weight.add_(1)
    with pytest.raises(UserError, match=r"classifier\.weight was changed .* save what you trained"):
        adapter.unmerge()
    other: Any = copy.deepcopy(trained[0])
    adapter = load_adapter(other, saved)
    with torch.no_grad():
        other.classifier.weight.add_(1)
    with pytest.raises(UserError, match=r"was changed .* load the base"):
        adapter.merge()


def test_what_cannot_be_saved_is_refused(trained: Trained, tmp_path: Path) -> None:
    base, model, optimizer = trained
    spoiled: Any = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.classifier.bias[0] = float("inf")
    for call, message in (
        (lambda: save_adapter(copy.deepcopy(base), tmp_path, base), "equals its base"),
        (lambda: save_adapter(spoiled, tmp_path, base), r"classifier\.bias is not finite"),
        (lambda: save_adapter(model, tmp_path), "does not know where it came from"),
        (lambda: save_adapter(model, tmp_path, "nowhere/at-all-" + "x" * 99), "cannot be loaded"),
        (lambda: save_adapter(model, tmp_path, toy_model("llama")), "differ in the tensors"),
        (
            lambda: save_adapter(model, tmp_path, toy_model("bert")),
            r"float64 in the base and .* in the model: give the base",
        ),
        (lambda: save_adapter(model, tmp_path, base, tolerance=0.1), "needs the bases"),
        (lambda: save_adapter(model, tmp_path, base, optimizer, tolerance=1.0), "tolerance=1"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_adapter(trained[1], tmp_path / "file" / "adapter", trained[0])


def test_a_wrapped_model_is_refused_with_its_plain_name(trained: Trained, tmp_path: Path) -> None:
    base, model, optimizer = trained
    with pytest.raises(UserError, match=r"wrapped by DataParallel: give the plain one, model\.module"):
        save_adapter(nn.DataParallel(model), tmp_path, base, optimizer)


def renamed(optimizer: Any, rename: Callable[[str], str]) -> Any:
    other = copy.copy(optimizer)
    other.param_groups = [
        {**group, "param_names": [rename(name) for name in group["param_names"]]} for group in optimizer.param_groups
    ]
    return other


def test_an_optimizer_of_a_module_around_the_model_is_as_good(trained: Trained, tmp_path: Path) -> None:
    base, model, optimizer = trained
    for name, own in (("plain", optimizer), ("around", renamed(optimizer, lambda name: f"inner.{name}"))):
        save_adapter(model, tmp_path / name, base, own, tolerance=0.1)
    for file in (FACTS, TENSORS):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "around" / file).read_bytes()


def test_an_optimizer_of_another_model_with_the_same_names_is_refused(trained: Trained, tmp_path: Path) -> None:
    """As of a student, for its teacher."""
    base, model, optimizer = trained
    with pytest.raises(UserError, match=r"trains student\.bert.* leave out optimizer="):
        save_adapter(copy.deepcopy(model), tmp_path, base, renamed(optimizer, lambda name: f"student.{name}"))


def test_an_optimizer_of_other_names_is_refused_and_never_weakens_the_adapter(trained: Trained, tmp_path: Path) -> None:
    """Its weights would not be known as the base's."""
    base, model, optimizer = trained
    with pytest.raises(UserError, match=r"trains bert\.decoder.* leave out optimizer="):
        save_adapter(
            copy.deepcopy(model), tmp_path, base, renamed(optimizer, lambda name: name.replace("encoder", "decoder"))
        )
