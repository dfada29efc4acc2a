"""Engine `fast`: what is done with a model's parameters, weights and modules from outside means what it means before.

Averages and copies over `parameters()` are those of the function, `weight` is that of the last step, hooks stay.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, bert, blocks, fast, train
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.hooks import RemovableHandle

from sparsegrad import Basis, SparseGradLinear, find_mlp, prepare, to_linears
from sparsegrad.layers.block import BlockLinear

Restore = Callable[[nn.Module], Callable[[], None]]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCHES[0]).logits
    return found


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(to_linears(copy.deepcopy(model)).named_parameters())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_has_the_average_weights(use_buffers: bool) -> None:
    model = bert(torch.float64)
    optimizer, seen = fast(model), []
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    for batch in BATCHES:
        train(model, optimizer, [batch])
        average.update_parameters(model)
        logits(average)  # merges, between two updates
        seen.append(plain_weights(model))
    for name, weight in plain_weights(average.module).items():
        torch.testing.assert_close(weight, torch.stack([one[name] for one in seen]).mean(0))


def test_a_moving_average_by_hand_is_that_of_the_weights() -> None:
    model = bert(torch.float64)
    optimizer, average = fast(model), copy.deepcopy(model)
    expected = {name: weight.detach().clone() for name, weight in plain_weights(model).items()}
    for batch in BATCHES:
        train(model, optimizer, [batch])
        with torch.no_grad():
            for own, other in zip(average.parameters(), model.parameters(), strict=True):
                own.lerp_(other, 0.3)
            for name, weight in plain_weights(model).items():
                expected[name].lerp_(weight, 0.3)
    for name, weight in plain_weights(average).items():
        torch.testing.assert_close(weight.detach(), expected[name])


def by_copies(model: nn.Module, *, trained: bool = False) -> Callable[[], None]:
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad or not trained]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in kept:
            parameter.copy_(value)

    return restore


def by_vector(model: nn.Module) -> Callable[[], None]:
    vector = parameters_to_vector(model.parameters()).detach().clone()
    return lambda: vector_to_parameters(vector, model.parameters())


def through_data(model: nn.Module) -> Callable[[], None]:
    """Of trained parameters, as EMA classes do it; seen when the mode changes."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for parameter, value in kept:
            parameter.data.copy_(value)
        model.train(not model.training)

    return restore


@pytest.mark.parametrize("keep", [by_copies, lambda m: by_copies(m, trained=True), by_vector, through_data])
def test_parameters_that_were_kept_are_restored(keep: Restore) -> None:
    model = bert(torch.float64)
    optimizer = fast(model)
    train(model, optimizer, BATCHES[:2])
    restore, before = keep(model), logits(model)
    train(model, optimizer, BATCHES[2:])
    assert not torch.allclose(logits(model), before, atol=1e-4)
    restore()
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-12)


def test_linears_have_what_was_written_through_data() -> None:
    model = bert(torch.float64)
    train(model, fast(model), BATCHES[:1])
    logits(model)
    for layer in blocks(model):
        layer.core.data.zero_()
    to_linears(model)
    for name, weight in bert(torch.float64).named_parameters():
        if ".dense.weight" in name and "attention" not in name:
            torch.testing.assert_close(dict(model.named_parameters())[name], weight)


def test_a_change_of_mode_does_not_invalidate_a_graph() -> None:
    model = bert()
    fast(model)
    loss = model(**BATCHES[0]).loss
    model.eval()
    logits(model)
    model.train()
    loss.backward()


@pytest.mark.parametrize("unfreeze", [False, True])
def test_what_is_merged_is_no_weight_that_trains(unfreeze: bool) -> None:
    model = bert()
    optimizer = fast(model, train_rest=False, modules_to_save=["bert.encoder"])
    merged = {id(layer.merged) for layer in blocks(model)}
    assert not any(layer.merged.requires_grad for layer in blocks(model))
    assert merged.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"])
    model.requires_grad_(unfreeze)
    for parameter in copy.deepcopy(model).parameters() if unfreeze else ():
        parameter.requires_grad = True
    assert not any(layer.merged.requires_grad for layer in (*blocks(model), *blocks(copy.deepcopy(model))))
    for layer in blocks(model):
        layer.core.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    assert all(layer.merged.grad is None and layer.merged.equal(layer.core) for layer in blocks(model))


def test_a_pickled_layer_of_an_earlier_version_gets_its_parameter() -> None:
    layer = BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))
    merged = layer.merged.detach()
    del layer.merged
    layer.register_buffer("merged", merged)  # as it was
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert [name for name, _ in found.named_parameters()] == ["weight", "bias", "core", "merged"]
    assert list(found.state_dict()) == ["weight", "bias", "core", "merged"]


class Encoder(nn.Module):
    """In evaluation its layers read the weights of their linears, which they do not call."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.encoder(x)
        return {"loss": y[..., 0].square().mean(), "y": y}


@pytest.mark.parametrize("own", [True, False])
def test_who_reads_the_weight_sees_the_last_step(own: bool) -> None:
    torch.manual_seed(0)
    model, batches = Encoder(), [{"x": torch.randn(2, 5, 16)} for _ in range(4)]
    optimizer: torch.optim.Optimizer = prepare(
        model, batches, ["linear1", "linear2"], 0.1, 1e-2, engine="fast", calibration_steps=4
    )
    if not own:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for batch in batches:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    plain = to_linears(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(model(**batches[0])["y"], plain(**batches[0])["y"])


def test_a_weight_without_an_input_gradient_may_change_before_the_backward_pass() -> None:
    """As in `nn.Linear`: two losses of the first layer, with a step in between."""
    layer = BlockLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), (2, 2))
    optimizer, x = torch.optim.SGD([layer.core], lr=0.1), torch.randn(3, 8)
    first, second = layer(x).sum(), layer(x).square().sum()
    first.backward()
    optimizer.step()
    second.backward()
    assert layer.core.equal(layer.merged)


def add_hooks(linear: nn.Module) -> tuple[list[str], list[RemovableHandle]]:
    """Hooks of three kinds: what they note, and their handles."""
    seen: list[str] = []
    return seen, [
        linear.register_forward_pre_hook(lambda *_: seen.append("before")),
        linear.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True),
        linear.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]


class Subclass(nn.Linear):
    """A linear that cannot become a layer in place."""


@pytest.mark.parametrize("kind", [nn.Linear, Subclass])
def test_hooks_and_references_to_linears_stay(kind: type[nn.Linear]) -> None:
    model = bert()
    linear = model.bert.encoder.layer[0].output.dense
    linear.__class__ = kind
    seen, handles = add_hooks(linear)
    fast(model)
    assert (model.bert.encoder.layer[0].output.dense is linear) == (kind is nn.Linear)
    for change in (lambda: None, lambda: to_linears(model)):
        change()
        seen.clear()
        model(**BATCHES[0]).loss.backward()
        assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(**BATCHES[0])
    assert not seen


def test_the_papers_layer_gives_its_hooks_to_its_linear() -> None:
    layer = SparseGradLinear.from_linear(nn.Linear(8, 8), Basis.identity(8, 8), keep=3)
    seen, _ = add_hooks(layer)
    model = to_linears(nn.Sequential(layer).eval())
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    assert not model[0].training


def test_a_gradient_from_before_is_deleted() -> None:
    """The weight no longer trains, so that nothing else would delete it."""
    model = bert()
    model(**BATCHES[0]).loss.backward()
    fast(model)
    assert all(layer.weight.grad is None for layer in blocks(model))


def test_engines_follow_each_other_in_the_same_modules() -> None:
    model = bert()
    linears = [linear for found in find_mlp(model).values() for linear in found.values()]
    for engine in ("exact", "fast"):
        train(model, prepare(model, BATCHES, calibration_steps=3, engine=engine))
    assert {id(layer) for layer in blocks(model)} == set(map(id, linears))
    to_linears(model)
    train(model, prepare(model, BATCHES, calibration_steps=3))
