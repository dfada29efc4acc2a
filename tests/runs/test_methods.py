"""What each method does to the model, against the paper's numbers and hand-made gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from run_fixtures import Composer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from sparsegrad import Basis, UserError, calibrate, find_mlp
from sparsegrad.methods.base import Context, Prepared
from sparsegrad.methods.lora import Lora
from sparsegrad.methods.meprop import MeProp
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.sparsegrad_authors import SparseGradAuthors
from sparsegrad.runs.config import build

OFF = {
    "transposed_in_basis": False,
    "rotated_bias_gradient": False,
    "frozen_layer_norm": False,
    "training_calibration": False,
}


@pytest.fixture
def model(small_bert: BertForSequenceClassification) -> BertForSequenceClassification:
    return small_bert


def batch(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(50, (4, 7), generator=generator), torch.randint(2, (4,), generator=generator)
    return {"input_ids": ids, "labels": labels}


def context(**changes: Any) -> Context:
    def batches() -> Iterator[dict[str, Tensor]]:
        seed = 0
        while True:
            seed += 1
            yield batch(seed)

    values: dict[str, Any] = {
        "lr": 1e-3,
        "weight_decay": 0.0,
        "train_rest": True,
        "is_head": lambda name: name.startswith("classifier"),
        "batches": batches,
        "calibrated": lambda settings, compute: (compute(), {}),
    }
    return Context(**{**values, **changes})


def prepared(method: Any, model: nn.Module, **changes: Any) -> Prepared:
    linears = find_mlp(model)
    method.check(linears)
    result: Prepared = method.prepare(model, linears, context(**changes))
    return result


def bases_of(result: Prepared) -> list[Basis]:
    return [group["basis"] for group in result.optimizer.param_groups if group.get("basis") is not None]


PAPER = [
    ("bert_base", "lora", {"rank": 7, "alpha": 1}),
    ("roberta_base", "lora", {"rank": 7, "alpha": 1}),
    ("roberta_large", "lora", {"rank": 10, "alpha": 1}),
    ("roberta_large", "lora_tuned", {"rank": 10, "alpha": None}),
    ("roberta_base", "meprop", {"density": 0.01, "keep": None}),
    ("roberta_base", "sparsegrad", {"density": 0.01, "keep": None, "steps": 30, "engine": "exact"}),
    ("bert_base", "sparsegrad_authors", {"density": None, "keep": 28000, "steps": 11}),
    ("roberta_large", "sparsegrad_authors", {"density": None, "keep": 50000, "steps": 11}),
]


@pytest.mark.parametrize(("name", "method", "expected"), PAPER)
def test_settings_are_the_papers(conf: Composer, name: str, method: str, expected: dict[str, Any]) -> None:
    found = build(conf(f"model={name}", f"method={method}", "task=cola")).method
    assert {field: getattr(found, field) for field in expected} == expected


def test_all_switches_of_the_authors_are_on_by_default(conf: Composer) -> None:
    found = build(conf("method=sparsegrad_authors")).method
    assert {field: getattr(found, field) for field in OFF} == dict.fromkeys(OFF, True)


def test_the_protocol_is_the_papers(conf: Composer) -> None:
    config = build(conf("protocol=paper", "task=cola", "train.batch_size=32"))
    assert (config.protocol.epochs, config.protocol.patience, config.protocol.select) == (20, 5, "validation")
    assert config.protocol.steps_between_evaluations(config.task.eval_base, 32, 10**6) == 50
    assert (config.train.weight_decay, config.train.precision, config.data.max_length) == (0.0, "fp32", 128)


@pytest.mark.parametrize(("alpha", "scale"), [(1, 1 / 4), (None, 2.0), (6, 1.5)])
def test_lora_adds_its_scaled_product(model, alpha: int | None, scale: float) -> None:
    linear = model.bert.encoder.layer[0].intermediate.dense
    x, weight = torch.randn(3, 16), linear.weight.detach().clone()
    prepared(Lora(rank=4, alpha=alpha), model)
    layer: Any = model.bert.encoder.layer[0].intermediate.dense
    assert isinstance(layer, LoraLayer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(B, torch.zeros(32, 4))
    with torch.no_grad():
        B.normal_()
    expected = x @ (weight + scale * B @ A).T + linear.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_the_authors_basis_is_the_transposed_one(model) -> None:
    plain = bases_of(prepared(SparseGradAuthors(keep=9, steps=2, **OFF), model))
    switched = bases_of(prepared(SparseGradAuthors(keep=9, steps=2, **{**OFF, "transposed_in_basis": True}), model))
    for basis, authors in zip(plain, switched, strict=True):
        assert torch.equal(authors.in_basis, basis.in_basis.T)
        assert torch.equal(authors.out_basis, basis.out_basis)


@pytest.mark.parametrize("engine", ["exact", "layer"])
def test_the_authors_bias_gradient_is_rotated(model, engine: str) -> None:
    names = [f"{name}.bias" for found in find_mlp(model).values() for name in found]
    model(**batch()).loss.backward()
    plain = {name: model.get_parameter(name).grad.clone() for name in names}
    mlp = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    kinds = {f"{name}.bias": kind for kind, found in find_mlp(model).items() for name in found}
    model.zero_grad()
    bases = calibrate(model, [batch()], mlp, steps=1)
    method = SparseGradAuthors(keep=9, steps=1, engine=engine, **{**OFF, "rotated_bias_gradient": True})
    prepared(method, model, calibrated=lambda settings, compute: (bases, {}))
    model(**batch()).loss.backward()
    for name in names:
        expected = bases[kinds[name]].out_basis.T @ plain[name]
        assert torch.allclose(model.get_parameter(name).grad, expected, atol=1e-6)


def test_the_authors_layer_norms_are_in_no_optimizer(model) -> None:
    result = prepared(SparseGradAuthors(keep=9, steps=1, **{**OFF, "frozen_layer_norm": True}), model)
    covered = {id(parameter) for group in result.optimizer.param_groups for parameter in group["params"]}
    norms = [parameter for name, parameter in model.named_parameters() if "LayerNorm" in name]
    assert norms
    assert not any(id(parameter) in covered or parameter.requires_grad for parameter in norms)


def test_the_authors_calibration_trains_and_its_updates_stay(model) -> None:
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    prepared(SparseGradAuthors(keep=9, steps=1, **OFF), model)
    assert torch.equal(before, model.bert.embeddings.word_embeddings.weight)
    prepared(SparseGradAuthors(keep=9, steps=1, **{**OFF, "training_calibration": True}), model)
    assert not torch.equal(before, model.bert.embeddings.word_embeddings.weight)


def test_without_its_switches_the_authors_method_is_the_papers(model) -> None:
    authors = bases_of(prepared(SparseGradAuthors(keep=9, steps=2, **OFF), model))
    paper = bases_of(prepared(SparseGrad(density=None, keep=9, steps=2), model))
    assert all(torch.equal(a.in_basis, p.in_basis) for a, p in zip(authors, paper, strict=True))


def test_meprop_masks_the_gradient_after_accumulation_and_runs_plain_adamw(model) -> None:
    result, weight = (
        prepared(MeProp(density=None, keep=10), model),
        model.bert.encoder.layer[0].intermediate.dense.weight,
    )
    model(**batch(1)).loss.backward()
    model(**batch(2)).loss.backward()
    dense, before = weight.grad.clone(), weight.detach().clone()
    result.optimizer.step()
    kept = dense.abs().flatten().topk(10).indices
    assert torch.equal(weight.grad.flatten().nonzero().flatten(), kept.sort().values)
    # The first step of AdamW moves each entry by the learning rate, whatever its size.
    assert torch.equal((weight != before).flatten().nonzero().flatten(), kept.sort().values)


def test_a_head_that_matches_nothing_is_named(model) -> None:
    with pytest.raises(UserError, match=r"model\.head matches no parameter"):
        prepared(MeProp(), model, is_head=lambda name: False)


def test_a_given_basis_and_a_training_calibration_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training_calibration=true"):
        SparseGradAuthors(keep=9, basis=str(tmp_path / "basis.safetensors"))


def test_the_authors_method_refuses_weights_whose_sides_are_the_other_way_round() -> None:
    with pytest.raises(UserError, match=r"not Conv1D.*method=sparsegrad"):
        SparseGradAuthors(keep=2).check({"up": {"a": Conv1D(4, 3)}})


def test_lora_of_the_authors_draws_a_as_if_its_fan_in_were_the_rank(model: nn.Module) -> None:
    spread = {}
    for init in (False, True):
        fresh = copy.deepcopy(model)
        torch.manual_seed(0)
        Lora(rank=2, authors_init=init).prepare(fresh, find_mlp(fresh), context())
        drawn = [p.detach() for name, p in fresh.named_parameters() if ".lora_A." in name]
        spread[init] = torch.cat([one.flatten() for one in drawn]).std().item()
        zero = [p for name, p in fresh.named_parameters() if ".lora_B." in name]
        assert all(torch.count_nonzero(p) == 0 for p in zero)
    assert spread[True] == pytest.approx((3 * 2) ** -0.5, rel=0.2)
    assert spread[False] == pytest.approx((3 * 22) ** -0.5, rel=0.2)  # between 16 and 32 inputs


def test_the_authors_calibration_is_clipped(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegrad.methods.sparsegrad_authors.MAX_NORM", 1e-2)  # this model's gradients are small
    norms: dict[bool, list[float]] = {False: [], True: []}
    for clipped, seen in norms.items():

        def watch(optimizer: torch.optim.Optimizer, *_: Any, into: list[float] = seen) -> None:
            found = [one.grad for group in optimizer.param_groups for one in group["params"]]
            into.append(float(torch.nn.utils.get_total_norm([one for one in found if one is not None])))

        fresh = copy.deepcopy(model)
        method = SparseGradAuthors(keep=9, steps=3, clipped_calibration=clipped)
        hook = register_optimizer_step_pre_hook(watch)
        method.prepare(fresh, find_mlp(fresh), context())
        hook.remove()
    assert min(norms[False]) > 1.1e-2
    assert norms[True] == pytest.approx([1e-2] * 3, rel=1e-3)
