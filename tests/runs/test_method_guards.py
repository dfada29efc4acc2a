"""What methods refuse before anything is computed, with a remedy that works; and what they take from a model."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_methods import batch, context, prepared
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from test_saving import answers, base
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from sparsegrad import UserError, find_mlp
from sparsegrad.methods.floors import BitFit, Frozen
from sparsegrad.methods.full import Full
from sparsegrad.methods.gradients import mean_gradients
from sparsegrad.methods.lora_sb import LoraSb
from sparsegrad.methods.lora_xs import LoraXs
from sparsegrad.methods.meprop import MeProp
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.sparsegrad_authors import SparseGradAuthors
from sparsegrad.methods.sparsegrad_fast import SparseGradFast
from sparsegrad.methods.static_mask import StaticMask
from sparsegrad.optim.rest import outside, set_rest_rate
from sparsegrad.runs.memory_estimate import estimate_memory, make_setup
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import MAX_ERROR, model_folder
from sparsegrad.trainer import parallel


class TwoLinears(nn.Module):
    """A chosen linear and a head, each with a loss of its own; `unused` is in no forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.classifier, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.mlp(x).square().mean() + (self.classifier(x) - 3).square().mean()}

    def linears(self, *names: str) -> Any:
        return {"mlp": {name: self.get_submodule(name) for name in ("mlp", *names)}}


def constant(value: float = 1.0) -> Any:
    return context(lr=0.1, batches=lambda: repeat({"x": torch.full((3, 4), value)}))


def test_a_training_calibration_sees_its_own_steps_under_autocast() -> None:
    """An autocast around all of it keeps copies of plain linears' weights."""
    model, seen = TwoLinears(), []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().float()))
    with torch.autocast("cpu", torch.bfloat16):
        SparseGradAuthors(keep=3, steps=3).prepare(model, model.linears(), constant())
    assert len(seen) == 3
    assert ((seen[0] - 3).abs() > (seen[1] - 3).abs()).all()
    assert ((seen[1] - 3).abs() > (seen[2] - 3).abs()).all()


@pytest.mark.parametrize("kind", [SparseGrad, SparseGradAuthors])
def test_released_gradients_are_not_accumulated(kind: Any) -> None:
    model, method = TwoLinears(), kind(keep=3, density=None, steps=1, release_gradients=True)
    with pytest.raises(UserError, match=r"release_gradients=true .*train\.grad_accumulation=2.* set the first"):
        method.prepare(model, model.linears(), replace(constant(), accumulation=2))


@pytest.mark.parametrize("sides", ["in", "out", "small"])
def test_the_authors_method_refuses_one_side(sides: str) -> None:
    off = {"training_calibration": False, "transposed_in_basis": False}
    for switches in ({}, off):
        with pytest.raises(UserError, match=rf"method\.sides={sides} is not allowed.*method=sparsegrad$"):
            SparseGradAuthors(keep=9, sides=sides, **switches)


def test_a_transposed_basis_needs_the_side_that_it_transposes() -> None:
    match = r"method\.sides={} is not allowed.*transposes the basis of the input side.*method\.sides=both or in"
    with pytest.raises(UserError, match=match.format("out")):
        SparseGrad(basis="authors", sides="out")
    narrow, wide = nn.Linear(4, 8), nn.Linear(8, 4)
    small = SparseGrad(basis="authors", sides="small", density=0.5)
    small.check({"up": {"a": narrow}})
    with pytest.raises(UserError, match=match.format("small")):
        small.check({"up": {"a": narrow}, "down": {"b": wide}})
    for sides in ("both", "in"):
        SparseGrad(basis="authors", sides=sides, density=0.5).check({"up": {"a": narrow}, "down": {"b": wide}})


CONV = [
    (SparseGradFast(), "use method=sparsegrad"),
    (LoraXs(density=0.5), "use method=sparsegrad"),
    (LoraSb(density=0.5), "use method=sparsegrad"),
    (SparseGradAuthors(keep=2, engine="layer"), "use method=sparsegrad"),
    (SparseGrad(density=0.5, engine="layer"), r"use method\.engine=exact"),
    (SparseGrad(density=0.5, drop_padding=True), r"set method\.drop_padding=false"),
    (SparseGrad(density=0.5, save_dtype="bf16"), r"method\.save_dtype=null"),
]


@pytest.mark.parametrize(("method", "remedy"), CONV)
def test_a_conv1d_is_refused_before_any_calibration(method: Any, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"not Conv1D: .*{remedy}"):
        method.check({"up": {"a": Conv1D(4, 3)}})
    method.check({"up": {"a": nn.Linear(4, 3)}})
    SparseGrad(density=0.5).check({"up": {"a": Conv1D(4, 3)}})


@pytest.mark.parametrize("shapes", [[(96, 48)], [(30, 20)], [(96, 90), (96, 50)], [(4096, 2731)]])
def test_a_density_above_the_largest_rank_is_named_as_one(shapes: list[tuple[int, int]]) -> None:
    linears = {f"kind{n}": {"a": nn.Linear(*shape, device="meta")} for n, shape in enumerate(shapes)}
    with pytest.raises(UserError, match=r"^method\.density=0\.97 is not allowed: the rank of kind") as error:
        LoraXs(density=0.97).check(linears)
    LoraXs(density=float(str(error.value).split("give at most ")[1])).check(linears)


@pytest.mark.parametrize("method", [Frozen(), BitFit()])
def test_the_floors_name_a_head_that_matches_nothing(method: Any, small_bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r"model\.head matches no parameter of Bert"):
        prepared(method, small_bert, is_head=lambda name: False)


def test_bitfit_is_refused_where_only_the_head_would_train() -> None:
    model = TwoLinears()
    for linear in (model.mlp, model.unused):
        linear.bias = None
    with pytest.raises(UserError, match=r"no bias outside its head: .* method=frozen"):
        BitFit().prepare(model, model.linears(), constant())


def test_biases_of_other_names_train_with_bitfit() -> None:
    """As DeBERTa's q_bias; a table of biases is none."""
    model = TwoLinears()
    model.q_bias, model.position_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 4))
    BitFit().prepare(model, model.linears(), constant())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_bias", "mlp.bias", "unused.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("method", [StaticMask(keep=2, density=None, steps=2), LoraSb(rank=1, density=None, steps=2)])
def test_gradients_that_no_choice_can_be_made_from_are_refused(method: Any) -> None:
    model = TwoLinears()
    with pytest.raises(UserError, match="a calibration gradient is not finite"):
        method.prepare(model, model.linears(), constant(float("nan")))
    with pytest.raises(UserError, match=r"got no gradient of unused\.weight from 2 batches: name only linears that"):
        method.prepare(model, model.linears("unused"), constant())


def test_released_gradients_are_refused_by_methods_that_collect_gradients() -> None:
    model = TwoLinears()
    optimizer = StaticMask(keep=2, density=None, steps=1).prepare(model, model.linears(), constant()).optimizer
    optimizer.release_gradients()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="stop_releasing"):
        mean_gradients(model, model.linears(), constant(), 1)


@pytest.mark.parametrize(
    "method", [Full(), MeProp(), SparseGrad(steps=1), SparseGrad(steps=1, engine="layer"), SparseGradFast(steps=1),
               LoraXs(), StaticMask(steps=1)]
)  # fmt: skip
def test_every_engine_calls_the_same_parameters_the_rest(method: Any, small_bert: nn.Module) -> None:
    """All but the MLP weights, their biases included."""
    linears = find_mlp(small_bert)
    weights = {f"{name}.weight" for found in linears.values() for name in found}
    expected = {name for name, _ in small_bert.named_parameters()} - weights
    rest = outside(small_bert, linears)
    result = method.prepare(small_bert, linears, context())
    set_rest_rate(result.optimizer, rest, 1e-5)
    slow = {id(p) for group in result.optimizer.param_groups for p in group["params"] if group["lr"] == 1e-5}
    assert {name for name, parameter in small_bert.named_parameters() if id(parameter) in slow} == expected
    small_bert(**batch()).loss.backward()
    result.optimizer.step()


OWN = SparseGradFast(steps=1, name="fast_small")


def test_engine_fast_has_its_memory_under_any_name(small_bert: Any) -> None:
    train = SimpleNamespace(batch_size=4, precision="bf16_weights", gradient_checkpointing=False, train_rest=False)
    parts: dict[str, Any] = {"train": train, "data": SimpleNamespace(max_length=9)}
    parts["task"] = SimpleNamespace(is_language=False)
    need = [
        estimate_memory(make_setup(SimpleNamespace(method=method, **parts), small_bert, find_mlp(small_bert)))  # type: ignore[arg-type]
        for method in (SparseGradFast(), OWN, SparseGrad(), SparseGrad(name="own"))
    ]
    assert need[0] == need[1]
    assert need[2] == need[3]
    assert need[0]["bases"] > 0


def test_fsdp2_takes_engine_fast_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    for method in (OWN, Full(name="own")):
        parallel.check_parallel("fsdp2", method)
    with pytest.raises(UserError, match="not allowed with method=sparsegrad_fast: "):
        parallel.check_parallel("fsdp2", SparseGrad(name="sparsegrad_fast"))


@pytest.mark.parametrize(
    ("method", "name", "bound"), [("sparsegrad_fast", "fast_small", 1e-4), ("sparsegrad", "sparsegrad_fast", MAX_ERROR)]
)
def test_a_lora_of_engine_fast_is_exact_under_any_name(
    method: str, name: str, bound: float, made: Made, source: Path
) -> None:
    """Its layers hold the factors of their change; that of any other method becomes matrices by an SVD."""
    config = made(f"method={method}", f"method.name={name}", "save_adapter=lora", "save_model=true")
    run(config)
    card = (config.adapter_folder / "README.md").read_text()
    errors = [float(error) for error in re.findall(r"^\| `.*` \| \d+ \| (\S+) \|$", card, re.MULTILINE)]
    assert bound / 1000 < max(errors) <= bound
    trained = answers(BertForSequenceClassification.from_pretrained(model_folder(config)), source)
    served = answers(PeftModel.from_pretrained(base(source), config.adapter_folder), source)
    assert (served - trained).norm() <= bound * (trained - answers(base(source), source)).norm()
