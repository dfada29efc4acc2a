"""`prepare` with one side, compact moments, stored bases, or sums elsewhere is what one would build by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prepare import batches
from torch import Tensor, nn
from toy_bert import ToyBert

from sparsegrad import Basis, SparseGradAdamW, UserError, calibrate, find_mlp, prepare
from sparsegrad.basis import load_bases, save_bases
from sparsegrad.calibration.grams import Grams
from sparsegrad.optim.groups import param_groups

LR = 1e-2
WHOLE = {"intermediate": Basis.identity(32, 16), "output": Basis.identity(16, 32)}


def copies(model: nn.Module, count: int) -> list[nn.Module]:
    return [copy.deepcopy(model).eval() for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]]) -> None:
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("sides", ["both", "in", "out", "small"])
@pytest.mark.parametrize("moments", ["dense", "support"])
def test_it_is_the_groups_and_the_optimizer_made_by_hand(small_bert: ToyBert, sides: str, moments: str) -> None:
    one, other = copies(small_bert, 2)
    optimizer = prepare(one, batches(3), keep=9, lr=LR, calibration_steps=3, sides=sides, moments=moments)
    linears = find_mlp(other)
    bases = calibrate(other, batches(3), {kind: list(of.values()) for kind, of in linears.items()}, 3, sides=sides)
    by_hand = SparseGradAdamW(param_groups(other, linears, bases, keep=9, moments=moments), lr=LR)
    train(one, optimizer, batches(4))
    train(other, by_hand, batches(4))
    assert_equal(one, other)
    assert {basis.shape.count(None) for basis in optimizer.bases.values()} == {int(sides != "both")}
    assert ("used" in optimizer.state[linears_of(one)[0].weight]) == (moments == "support")


def linears_of(model: nn.Module) -> list[nn.Linear]:
    return [linear for found in find_mlp(model).values() for linear in found.values()]


@pytest.mark.parametrize("options", [{}, {"sides": "small"}, {"moments": "support"}])
def test_stored_bases_stand_for_the_calibration_and_a_stopped_training_goes_on_to_the_bit(
    small_bert: ToyBert, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Through files, into a model and an optimizer that are new; no batch is read."""
    whole, halves, fresh = copies(small_bert, 3)
    data, settings = batches(6), {"density": 0.05, "lr": LR, **options}
    train(whole, prepare(whole, batches(3), calibration_steps=3, **settings), data)
    first = prepare(halves, batches(3), calibration_steps=3, **settings)
    train(halves, first, data[:3])
    save_bases(tmp_path / "bases.safetensors", first.bases)
    torch.save({"model": halves.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")

    second = prepare(fresh, None, bases=load_bases(tmp_path / "bases.safetensors"), **settings)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(fresh, second, data[3:])
    assert_equal(whole, fresh)


def test_stored_bases_of_both_sides_give_those_that_are_asked_for(small_bert: ToyBert) -> None:
    optimizer = prepare(small_bert, None, bases=WHOLE, sides="small")
    assert {kind: basis.shape for kind, basis in optimizer.bases.items()} == {
        "intermediate": (None, 16),
        "output": (16, None),
    }


def test_the_sums_are_kept_where_they_are_wanted(small_bert: ToyBert, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "sparsegrad.calibration.gradients.Grams", lambda **given: seen.append(given["device"]) or Grams(**given)
    )
    prepare(small_bert, batches(2), calibration_steps=2, gram_device="cpu")
    assert seen == ["cpu", "cpu"]


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_the_rest_is_frozen_but_for_what_is_named(small_bert: ToyBert, engine: str) -> None:
    small_bert.classifier.requires_grad_(False)
    other = copy.deepcopy(small_bert)
    settings = {"density": 0.1, "engine": engine, "rest_lr": 0.5}
    optimizer = prepare(small_bert, None, bases=WHOLE, train_rest=False, modules_to_save=["classifier"], **settings)
    groups = [(group.get("kind"), group["lr"]) for group in optimizer.param_groups]
    assert groups == [("intermediate", 1e-4), ("output", 1e-4), (None, 0.5)]
    assert optimizer.param_groups[-1]["param_names"] == ["classifier.weight", "classifier.bias"]
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in small_bert.parameters() if parameter.requires_grad}
    with pytest.raises(UserError, match="no module with parameters of ToyBert: did you mean classifier"):
        prepare(other, never(), train_rest=False, modules_to_save=["clasifier"])


@pytest.mark.parametrize("engine", ["exact", "fast"])
def test_vectors_are_left_out_of_weight_decay_on_request(small_bert: ToyBert, engine: str) -> None:
    settings = {"density": 0.1, "engine": engine, "weight_decay": 0.1, "rest_lr": 0.5}
    optimizer = prepare(small_bert, None, bases=WHOLE, decay_vectors=False, **settings)
    matrices, vectors = optimizer.param_groups[-2:]
    assert (matrices["weight_decay"], vectors["weight_decay"], vectors["lr"]) == (0.1, 0.0, 0.5)
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    assert {"classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight"} <= set(vectors["param_names"])
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(one) for one in small_bert.parameters() if one.requires_grad)


def never() -> Any:
    raise AssertionError("a batch was read")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sides": "left"}, "sides=left is not allowed: choose one of both, in, out, small"),
        ({"moments": "some"}, "moments=some is not allowed: choose one of dense, support"),
        ({"gram_device": "abacus"}, r"gram_device=abacus cannot be used \(.*: give cpu"),
        ({"gram_device": 1.5}, r"gram_device=1\.5 cannot be used"),
        ({"train_rest": False}, r'a new head included: name .* modules_to_save=\["classifier"\], or give .*=\[\] if'),
        ({"train_rest": 2}, "train_rest=2 is not allowed"),
        ({"train_rest": False, "modules_to_save": [], "rest_lr": 1e-5}, "rest_lr=1e-05 has no effect"),
        ({"modules_to_save": ["classifier"]}, "belongs to train_rest=False: .* leave it out"),
        (
            {"train_rest": False, "modules_to_save": "classifier"},
            "modules_to_save=classifier is not allowed: give a list",
        ),
        ({"rest_lr": -1.0}, "rest_lr=-1.0 is not allowed: give a number of at least 0"),
        ({"decay_vectors": None}, "decay_vectors=None is not allowed"),
        ({"bases": [Basis.identity(32, 16)]}, r"bases is a list: give \{kind: Basis\}, as load_bases"),
        ({"bases": {"output": torch.eye(16)}}, r"bases is a dict: give \{kind: Basis\}"),
        ({"bases": {}}, "kinds none, the model's linears of intermediate, output: .*same target_modules="),
        ({"bases": {"output": WHOLE["output"]}}, "bases are of the kinds output, the model's linears of intermediate,"),
        ({"bases": {**WHOLE, "gate": WHOLE["output"]}}, "kinds intermediate, output, gate, the model's"),
        (
            {"bases": {**WHOLE, "output": Basis.identity(32, 16)}},
            r"for \(32, 16\) does not fit the weights \(16, 32\) of kind output: give",
        ),
        (
            {"bases": {kind: basis.only("in") for kind, basis in WHOLE.items()}},
            r"a basis for \(None, 16\) does not have sides=both: name the side it has",
        ),
    ],
)
def test_bad_options_are_named_before_any_batch_is_read(
    small_bert: ToyBert, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(small_bert, never(), **options)


def test_no_batches_and_no_bases_is_nothing(small_bert: ToyBert) -> None:
    with pytest.raises(UserError, match="batches=None leaves nothing to calibrate on: give batches, or stored bases"):
        prepare(small_bert, None)
