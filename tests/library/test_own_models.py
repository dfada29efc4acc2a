"""Models of a user's own: zero gradients, hooks that step, copies, batched gradients, and likely mistakes."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from own_models import NAMES, Net, batches, outputs, prepared, train
from torch import Tensor, nn

from sparsegrad import Basis, UserError, calibrate, find_mlp, hosvd, save_bases, to_linears
from sparsegrad.adapter.merge import Patch, mark
from sparsegrad.optim.later import Later


def test_a_group_of_rotated_gradients_needs_its_density() -> None:
    model = Net()
    optimizer = prepared(model)
    for group in optimizer.param_groups:
        group["density"] = None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="a group with a basis has neither keep nor density"):
        train(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_density_for_biases_is_named() -> None:
    model = Net()
    optimizer = prepared(model)
    for group in optimizer.param_groups:
        group["density"] = 0.2
    with pytest.raises(UserError, match=r"bias cannot be SparseGrad.*such groups alone"):
        train(model, optimizer)


def test_gradients_that_are_all_zero_have_an_arbitrary_basis_and_a_warning() -> None:
    model = Net()
    for block in model.blocks:
        nn.init.zeros_(block.down.weight)
    with pytest.warns(UserWarning, match="all calibration gradients of a layer kind are zero.*basis is arbitrary"):
        prepared(model)
    nn.init.normal_(model.blocks[0].down.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(to_linears(model))


@pytest.mark.parametrize("method", ["gram", "stacked"])
def test_both_ways_of_hosvd_check_and_cast_alike(method: str) -> None:
    gradients = list(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))
    if method == "stacked":
        pytest.importorskip("tensorly")
    assert hosvd([one.bfloat16() for one in gradients], method=method).dtype == torch.float32
    for wrong, said in (
        ([*gradients, torch.full((6, 4), float("nan"))], "not finite"),
        ([*gradients, torch.randn(4, 6)], "shape|one kind per shape"),
    ):
        with pytest.raises(UserError, match=said):
            hosvd(wrong, method=method)


def test_an_optimizer_in_the_backward_pass_does_not_step_during_calibration() -> None:
    model = Net()
    before, stepped = copy.deepcopy(model.state_dict()), []

    def step(parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
        stepped.append(parameter)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(functools.partial(step, optimizer=own))
    calibrate(model, batches(), find_mlp(model, NAMES), 4)
    assert not stepped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(**batches()[0]).loss.backward()
    assert len(stepped) == len(list(model.parameters()))


@pytest.mark.parametrize("autocast", [False, True])
def test_batched_gradients_are_refused_and_the_remedy_works(autocast: bool) -> None:
    found = []
    for order in ("auto", "gradient"):
        model, x = Net(), batches()[0]["x"].requires_grad_()
        prepared(model, rotation_order=order)
        y = outputs(model, x)
        refused = pytest.raises(UserError, match=r"batched gradients .*rotation_order='gradient'")
        with refused if order == "auto" else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found += torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True)
    assert found[0].shape == (8, 8, 8)


def test_hooks_stay_when_a_calibration_fails() -> None:
    model, seen = Net(), []
    model.head.weight.register_post_accumulate_grad_hook(seen.append)
    linears = find_mlp(model, NAMES)
    model.blocks[0].up.weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        calibrate(model, batches(), linears, 4)
    model(**batches()[0]).loss.backward()
    assert len(seen) == 1


def test_linears_of_a_copy_are_mentioned() -> None:
    model = Net()
    with pytest.raises(UserError, match="the linears have to be those of this model, not of a copy"):
        calibrate(copy.deepcopy(model), batches(), find_mlp(model, NAMES), 4)


def test_a_model_can_be_copied_while_a_device_counts() -> None:
    model = Net()
    prepared(model)
    later = Later(torch.tensor(0))
    later._arrival = torch.Event()  # type: ignore[assignment]
    model.blocks[0].up.rotation._ties.append(later)
    copied = copy.deepcopy(model)
    assert copied.blocks[0].up.rotation._ties == []
    torch.save(model, io.BytesIO())


def test_a_merge_in_inference_mode_leaves_parameters_that_can_train() -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    with torch.inference_mode():
        Patch(torch.ones(4), None, mark(weight)).swap(weight)
    assert weight.dtype == torch.float32
    (weight.requires_grad_(True).sum() * 2).backward()
    assert torch.equal(weight.grad, torch.full((2, 2), 2.0))


def test_an_earlier_optimizer_of_some_linears_is_named() -> None:
    model = Net()
    prepared(model)
    later = prepared(model, target_modules=["up"])
    with pytest.raises(
        UserError, match=r"rotates for the optimizer of another prepare: .* call sparsegrad\.to_linears"
    ):
        train(model, later)
    train(model, prepared(to_linears(model), target_modules=["up"]))


MISTAKES: dict[str, tuple[Any, str]] = {
    "one basis": (lambda path: save_bases(path, Basis.identity(2, 2)), "bases is .*Basis"),
    "numbered kinds": (lambda path: save_bases(path, {0: Basis.identity(2, 2)}), "bases is .*name of a layer kind"),
    "a list": (lambda _: Basis([[1.0]], None), "in_basis is a list: give a square matrix as a tensor"),
    "meta": (lambda _: prepared(Net().to("meta")), r"blocks\.0\.up\.weight has no values \(device meta\)"),
    "a parameter": (
        lambda _: prepared(Net(), train_rest=False, modules_to_save=["head.weight"]),
        "modules_to_save=head.weight is not allowed: modules train whole.*give 'head'",
    ),
    "a model's state": (
        lambda _: prepared(model := Net()).load_state_dict(model.state_dict()),
        "this is no state of an optimizer: give what optimizer.state_dict",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_likely_mistake_is_one_clear_error(mistake: str, tmp_path: Any) -> None:
    make, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        make(tmp_path / "bases.safetensors")
