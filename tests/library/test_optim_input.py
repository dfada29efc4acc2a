"""Hyperparameters, groups and states that the optimizer refuses or takes, at any time."""

from __future__ import annotations

import pytest
import torch
from optim_cases import IN, OUT, groups, network, random_basis
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradAdamW, UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is not allowed: give a number of at least 0"),
        ({"lr": torch.tensor(-1.0)}, "lr=-1.0"),
        ({"lr": torch.ones(1)}, "lr=.* is a Tensor"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "fast"}, "lr=fast"),
        ({"betas": (0.9, 1.0)}, "betas=1.0"),
        ({"betas": 0.9}, "betas=0.9 is not allowed: Adam has two"),
        ({"betas": (0.9, 0.9, 0.9)}, "Adam has two"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_hyperparameters_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseGradAdamW(network().parameters(), **arguments)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"density": 0}, "density=0 "),
        ({"density": 1.5}, "density=1.5 "),
        ({"keep": OUT * IN + 1}, "keep=97 .* to 96"),
        ({"keep": 0}, "keep=0 "),
        ({"keep": 3, "density": 0.1}, "exactly one"),
        ({"basis": Basis.identity(4, 4)}, "needs keep or density"),
        (
            {"keep": 3, "amsgrad": True},
            r"amsgrad=True has no effect on SparseGrad weights: set group\['amsgrad'\] = False",
        ),
        ({"keep": 3, "capturable": True}, "capturable=True has no effect"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"basis": Basis.identity(IN, OUT), "keep": 3}, r"basis for \(8, 12\) does not fit a weight \(12, 8\)"),
    ],
)
def test_bad_groups_are_named(group: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseGradAdamW(groups(network(), **group))


def test_a_refused_group_is_not_added() -> None:
    optimizer = SparseGradAdamW(groups(network(), keep=3))
    count, bias = len(optimizer.param_groups), nn.Parameter(torch.zeros(12))
    with pytest.raises(UserError, match="cannot be SparseGrad"):
        optimizer.add_param_group({"params": bias, "keep": 3})
    assert len(optimizer.param_groups) == count
    optimizer.add_param_group({"params": bias})
    assert len(optimizer.param_groups) == count + 1


def test_an_option_that_sparsegrad_lacks_is_refused_where_it_is_set_later() -> None:
    model = network()
    optimizer = SparseGradAdamW(groups(model, keep=3))
    optimizer.param_groups[0]["amsgrad"] = True
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UserError, match="amsgrad=True has no effect"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("named", [True, False])
def test_a_sparse_gradient_of_a_plain_group_is_refused_before_anything_moves(named: bool) -> None:
    model, embedding = network(), nn.Embedding(5, IN, sparse=True).double()
    optimizer = SparseGradAdamW([{"params": [("up", model[0].weight)], "keep": 3}] if named else groups(model, keep=3))
    optimizer.add_param_group({"params": [("words", embedding.weight)] if named else [embedding.weight]})

    def step() -> None:
        optimizer.zero_grad()
        model(embedding(torch.tensor([1, 3]))).sum().backward()
        optimizer.step()

    def everything() -> list[Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [one.detach().clone() for one in [*model.parameters(), embedding.weight, *states]]

    embedding.sparse = False
    step()
    before, embedding.sparse = everything(), True
    with pytest.raises(UserError, match=rf"^{'words' if named else '.*5, 8.*'} has a sparse gradient.*sparse=False"):
        step()
    assert all(map(torch.equal, everything(), before))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", ["list", "one", "pairs"])
def test_parameters_that_are_unfrozen_later_train(named: bool, form: str) -> None:
    model, later = network(), nn.Linear(2, 2, bias=False)
    optimizer = SparseGradAdamW(list(model.named_parameters()) if named else model.parameters(), lr=0.1)
    forms = {"list": [later.weight], "one": later.weight, "pairs": list(later.named_parameters())}
    if form == "pairs" and not named:
        return  # torch names the mistake
    optimizer.add_param_group({"params": forms[form], "lr": 0.01})
    before = later.weight.detach().clone()
    later.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(before - later.weight, torch.full((2, 2), 0.01), atol=1e-5)
    count = len(list(model.parameters()))
    names = {"list": [f"unnamed.{count}"], "one": [f"unnamed.{count}"], "pairs": ["weight"]}
    assert optimizer.param_groups[-1].get("param_names") == (names[form] if named else None)


def test_a_refused_state_changes_nothing() -> None:
    optimizer = SparseGradAdamW(groups(network(), keep=3), lr=0.5)
    state = optimizer.state_dict()
    foreign = [{**group, "lr": 0.1, "basis": Basis.identity(4, 4)} for group in state["param_groups"]]
    with pytest.raises(UserError, match="does not fit"):
        optimizer.load_state_dict({**state, "param_groups": foreign})
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["basis"] for group in optimizer.param_groups} == {None}


def test_float16_is_refused_and_what_works_is_named() -> None:
    with pytest.raises(UserError, match=r"SparseGrad weight in torch.float16 .* float32, .* or in bfloat16"):
        SparseGradAdamW([{"params": [nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))], "keep": 3}])


def test_a_bias_cannot_be_sparsegrad() -> None:
    with pytest.raises(UserError, match=r"parameter \(12,\) cannot be SparseGrad"):
        SparseGradAdamW([{"params": [network()[0].bias], "keep": 3}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["sparse", "plain"])
def test_another_dtype_after_the_first_step_is_named(trained: str, dtype: torch.dtype) -> None:
    model = network()  # in float64
    optimizer = SparseGradAdamW(groups(model, keep=3) if trained == "sparse" else model.parameters(), lr=0.1)
    model(torch.ones(2, IN, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.to(dtype)
    model(torch.ones(2, IN, dtype=dtype)).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match=rf"{dtype}, but its moments .* are torch.float64: convert the model before"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_float16_after_prepare_is_refused_too() -> None:
    model = network()
    optimizer = SparseGradAdamW(groups(model, keep=3), lr=0.1)
    model.half()(torch.ones(2, IN, dtype=torch.float16)).sum().backward()
    with pytest.raises(UserError, match=r"parameter \(12, 8\) in torch.float16 loses small updates"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_released_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = network()  # in float64
    optimizer = SparseGradAdamW([{"params": [model[0].weight], "keep": 3}], lr=0.1)
    optimizer.release_gradients()
    model(torch.ones(2, IN, dtype=torch.float64)).sum().backward()
    optimizer.step()
    model.to(dtype)
    before = model[0].weight.detach().clone()
    with pytest.raises(UserError, match=r"moments from earlier steps are torch.float64|torch.float16 loses small"):
        model(torch.ones(2, IN, dtype=dtype)).sum().backward()
    assert torch.equal(model[0].weight, before)


def test_what_an_optimizer_shows_has_no_matrices() -> None:
    model = network()
    shown = repr(SparseGradAdamW(groups(model, keep=3, basis=random_basis()), lr=0.1))
    assert "basis: Basis((12, 8), torch.float64)" in shown
    assert "tensor" not in shown
