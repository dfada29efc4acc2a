"""Every architecture with every method, small: only what should train has changed, and the record says so."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from run_fixtures import Tiny
from torch import Tensor, nn
from transformers import set_seed

from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.runs import runner as runs
from sparsegrad.runs.config import RunConfig

METHODS = {
    "full": (),
    "lora": (),
    "lora_tuned": (),
    "meprop": (),
    "sparsegrad": (),
    "layer": ("method=sparsegrad", "method.engine=layer"),
    "sparse_dense": ("method=sparsegrad", "method.engine=layer", "method.backward=sparse_dense"),
    "sparse_small_side": ("method=sparsegrad", "method.sides=small"),
    "sparse_support": ("method=sparsegrad", "method.moments=support"),
    "sparse_lean": (
        "method=sparsegrad",
        "method.release_gradients=true",
        "method.drop_padding=true",
        "method.save_dtype=bf16",
    ),
    "sparsegrad_authors": (),
    "sparsegrad_fast": (),
}
# Each architecture with every method; small, other models of an architecture differ in their YAML alone.
COMBINATIONS = (
    *itertools.product(("bert_base", "roberta_base"), METHODS),
    *itertools.product(("minilm", "roberta_large"), ("full", "sparsegrad")),
)
KEEP, RANK, SIZE, SIDES = 20, 2, 32 * 64, 32 + 64  # 1 % of a weight (64, 32); the tiny sizes of conftest
STEPS = 4
WEIGHTS = [f"encoder.layer.{i}.{kind}.dense.weight" for i in range(2) for kind in ("intermediate", "output")]


def is_mlp_weight(name: str) -> bool:
    return name.endswith(tuple(WEIGHTS)) and "attention" not in name


def trained(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Run; the record, the weights before, and the model as an ordinary one afterwards."""
    caught: list[Any] = []
    finish = runs.make_trainer

    def make_trainer(config: RunConfig, model: nn.Module, *rest: Any, **more: Any) -> Any:
        caught.append(model)
        return finish(config, model, *rest, **more)

    prepare = runs.prepare_method

    def prepared(*given: Any, **more: Any) -> Any:
        caught.append(prepare(*given, **more))
        return caught[-1]

    monkeypatch.setattr(runs, "make_trainer", make_trainer)
    monkeypatch.setattr(runs, "prepare_method", prepared)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    before = {
        name: value.clone() for name, value in load_model(config.model, config.task, tokenizer).named_parameters()
    }
    record, is_new = runs.run(config)
    assert is_new
    made, model = caught
    made.finish()
    return record, before, model


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def expected_count(method: str, before: dict[str, Tensor]) -> tuple[int, int]:
    """Numbers that may change in all, and per MLP weight, from the names and shapes alone."""
    rest = sum(value.numel() for name, value in before.items() if not is_mlp_weight(name))
    if method == "sparsegrad_authors":
        rest -= sum(value.numel() for name, value in before.items() if "LayerNorm" in name)
    per_weight = {"full": SIZE, "lora": RANK * SIDES, "lora_tuned": RANK * SIDES, "sparsegrad_authors": 40}
    per_weight["sparsegrad_fast"] = 6 * 3  # a tenth of 64 and of 32
    each = per_weight.get(method, KEEP)
    return rest + 4 * each, each


@pytest.mark.parametrize(("model", "method"), COMBINATIONS)
def test_every_architecture_with_every_method(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, model: str, method: str
) -> None:
    overrides = METHODS[method] or (f"method={method}",)
    record, before, after = trained(tiny(f"model={model}", *overrides), monkeypatch)
    assert record["status"] == "complete"
    assert [row["step"] for row in record["evaluations"]] == [2, STEPS]
    assert all(math.isfinite(row["loss"]) for row in record["evaluations"])
    total, each = expected_count(method, before)
    assert record["trainable"] == {
        "total": total,
        "per_weight": {"intermediate": each, "output": each},
        "model": (size := sum(value.numel() for value in before.values())),
        "share": pytest.approx(total / size, abs=1e-5),
        "mlp": {"trained": 4 * each, "total": sum(before[name].numel() for name in filter(is_mlp_weight, before))},
    }
    assert bool(record["calibration"]) == ("sparse" in method or method == "layer")
    # LoRA's MLP weights too, since it has been merged; the authors' LayerNorms too, in their calibration.
    expected = {name for name in before if is_mlp_weight(name) or "LayerNorm" in name or "classifier" in name}
    assert expected <= changed(before, after)


@pytest.mark.parametrize("method", METHODS)
def test_without_the_rest_only_mlp_weights_and_head_change(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    overrides = METHODS[method] or (f"method={method}",)
    config = tiny("model=roberta_base", "train.train_rest=false", *overrides)
    _, before, after = trained(config, monkeypatch)
    head = {name for name in before if name.startswith("classifier.")}
    assert changed(before, after) == head | {name for name in before if is_mlp_weight(name)}


def test_authors_leave_layer_norms_alone_after_a_calibration_that_does_not_train(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("model=bert_base", "method=sparsegrad_authors", "method.training_calibration=false")
    _, before, after = trained(config, monkeypatch)
    same = before.keys() - changed(before, after)
    assert {name for name in before if "LayerNorm" in name} == same


def test_lora_leaves_the_base_weights_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegrad.methods.lora._merge_adapters", lambda model, names: None)
    _, before, after = trained(tiny("model=minilm", "method=lora"), monkeypatch)
    found = dict(after.named_parameters())
    bases = [name for name in before if is_mlp_weight(name)]
    assert len(bases) == 4
    for name in bases:
        assert torch.equal(found[name.replace(".weight", ".base_layer.weight")], before[name])
    assert any(bool(value.abs().sum() > 0) for name, value in found.items() if "lora_B" in name)


def test_sparsegrad_moves_few_entries_of_the_rotated_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegrad.basis import load_bases

    config = tiny("model=bert_base", "method=sparsegrad")
    _, before, after = trained(config, monkeypatch)
    (stored,) = (config.run_folder.parent / "bases").glob("*.safetensors")
    found, bases = dict(after.named_parameters()), load_bases(stored)
    for name in filter(is_mlp_weight, before):
        basis = bases["intermediate" if "intermediate" in name else "output"]
        moved = basis.out_basis.T @ (found[name] - before[name]) @ basis.in_basis
        count = int((moved.abs() > 1e-3).sum())  # an Adam step at this rate is about 1e-2
        assert KEEP <= count <= KEEP * STEPS


@pytest.mark.parametrize(
    ("setting", "common"),
    [
        ("release_gradients=true", ()),
        ("drop_padding=true", ("method.rotation_order=gradient",)),  # a rotation on a CPU drops it in any case
    ],
)
def test_exact_savings_walk_the_same_path(tiny: Tiny, setting: str, common: tuple[str, ...]) -> None:
    short = ("protocol.max_steps=12", "protocol.eval_steps=4", "train.lr=1e-3", *common)
    saving = runs.run(tiny("model=bert_base", *short, f"method.{setting}"))[0]
    plain = runs.run(tiny("model=bert_base", *short))[0]
    assert [row["loss"] for row in saving["losses"]] == pytest.approx(
        [row["loss"] for row in plain["losses"]], rel=1e-4
    )


@pytest.mark.parametrize("model", ["bert_base", "roberta_large"])
def test_the_engines_walk_the_same_path(tiny: Tiny, model: str) -> None:
    engines = (
        ("method.engine=merged",),
        ("method.engine=layer",),
        ("method.engine=layer", "method.backward=sparse_dense"),
    )
    found = [
        runs.run(tiny(f"model={model}", "protocol.max_steps=12", "protocol.eval_steps=4", "train.lr=1e-3", *engine))[0]
        for engine in engines
    ]
    curves = [[row["loss"] for row in record["losses"] + record["evaluations"]] for record in found]
    assert len(set(curves[0])) == len(curves[0]) > 4
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-4)
