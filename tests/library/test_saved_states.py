"""A saved state is loaded into the optimizer of the same weights only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import SparseGradAdamW, UserError, prepare


class TwoKinds(nn.Module):
    """Two linears of one shape, as gate and up projections are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.g, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self.g(self.fc(x).relu())), labels)}


BATCHES = [
    {"x": torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)), "labels": torch.arange(6) % 3}
    for seed in range(4)
]


def trained(targets: Any = ("fc", "g"), wrap: Callable[[nn.Module], Any] = lambda model: model) -> SparseGradAdamW:
    """An optimizer after 4 steps, with the names of a model that is wrapped by `wrap`."""
    model = TwoKinds()
    optimizer = prepare(model, BATCHES, list(targets), density=0.1, calibration_steps=4)
    for batch in BATCHES:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {id(parameter): name for name, parameter in wrap(model).named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer


def refused(optimizer: SparseGradAdamW, state: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(optimizer.state_dict()["state"])
    names = [group.get("param_names") for group in optimizer.param_groups]
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    assert [group.get("param_names") for group in optimizer.param_groups] == names


def test_kinds_of_one_shape_in_another_order_are_refused() -> None:
    state = trained().state_dict()
    message = r"the saved state has fc\.weight where this optimizer has g\.weight: give prepare the same target_modules"
    refused(trained(["g", "fc"]), state, message)
    for group in state["param_groups"]:
        del group["param_names"]
    refused(trained(["g", "fc"]), state, "the saved state has fc where this optimizer has g:")


@pytest.mark.parametrize("of", ["SparseGrad", "plain AdamW"])
def test_the_state_of_another_optimizer_is_refused(of: str) -> None:
    mine, model = trained(), TwoKinds()
    sparse = mine.state_dict()
    other = torch.optim.AdamW([{"params": [weight]} for weight in (model.fc.weight, model.g.weight)])
    other.add_param_group({"params": list(model.head.parameters())})
    if of == "plain AdamW":
        refused(mine, other.state_dict(), "is trained by plain AdamW, that of this optimizer by SparseGrad")
    else:
        plain = SparseGradAdamW([{"params": group["params"]} for group in other.param_groups])
        refused(plain, sparse, "is trained by SparseGrad, that of this optimizer by plain AdamW")


def test_the_state_of_plain_adamw_is_refused_by_engine_fast_as_what_it_is() -> None:
    model = TwoKinds()
    mine = prepare(model, BATCHES, ["fc", "g"], density=0.1, calibration_steps=4, engine="fast")
    other = torch.optim.AdamW([{"params": group["params"]} for group in mine.param_groups])
    refused(mine, other.state_dict(), "is trained by plain AdamW, that of this optimizer by SparseGrad")


def test_parameters_beside_the_target_weights_may_have_other_names() -> None:
    state = trained().state_dict()
    state["param_groups"][2]["param_names"] = ["classifier.weight", "classifier.bias"]
    trained().load_state_dict(state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: nn.ModuleDict({"module": model}),
        lambda model: nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})}),
        lambda model: nn.ModuleDict({"model": model}),
    ],
    ids=["ddp", "compiled", "part of a model"],
)
def test_names_of_a_wrapped_model_are_the_same_names(wrap: Callable[[nn.Module], Any]) -> None:
    trained().load_state_dict(trained(wrap=wrap).state_dict())
    trained(wrap=wrap).load_state_dict(trained().state_dict())


def test_states_without_names_and_kinds_load() -> None:
    """Those of earlier versions, and groups that were added without names."""
    expected, state = trained(), copy.deepcopy(trained().state_dict())
    for group in state["param_groups"]:
        del group["param_names"]
        group.pop("kind", None)
    fresh = trained()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.state_dict()["state"], expected.state_dict()["state"], rtol=0, atol=0)
    added = copy.deepcopy(trained().state_dict())
    added["param_groups"][2]["param_names"] = ["unnamed.2", "unnamed.3"]
    trained().load_state_dict(added)
