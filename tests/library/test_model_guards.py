"""What a model can be that the method does not fit, or fits only at second look."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from toy_models import Conv1D

from sparsegrad import Basis, SparseGradLinear, UserError, calibrate, find_mlp, prepare
from sparsegrad.calibration.grams import Grams
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.lean import LeanLinear


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc11": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)})


def test_a_linear_under_two_kinds_is_named_with_both() -> None:
    with pytest.raises(UserError, match=r"^fc1 is of two kinds, a and b: write patterns"):
        find_mlp(network(), {"a": "fc1", "b": "fc.*1"})
    found = find_mlp(network(), {"a": "fc1", "b": "fc11"})
    assert {kind: list(linears) for kind, linears in found.items()} == {"a": ["fc1"], "b": ["fc11"]}


def test_a_list_that_names_a_linear_twice_takes_it_once() -> None:
    assert {kind: list(linears) for kind, linears in find_mlp(network(), ["fc1", "fc1"]).items()} == {"fc1": ["fc1"]}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    ],
)
def test_a_weight_that_is_computed_from_others_is_refused_and_the_remedy_works(change: Callable[..., Any]) -> None:
    model = network()
    change(model.fc1)
    with pytest.raises(UserError, match=r"^fc1\.weight is computed from other parameters") as caught:
        find_mlp(model, ["fc1", "fc2"])
    found = re.search(r"call (\S+\(module.*?\)) with module=(.*) first", str(caught.value))
    assert found is not None
    eval(found[1], {"torch": torch, "module": eval(found[2], {"model": model})})
    assert list(find_mlp(model, ["fc1", "fc2"])) == ["fc1", "fc2"]


@pytest.mark.parametrize("sides", ["in", "out", "small"])
def test_the_layer_refuses_a_basis_of_one_side_when_it_is_made(sides: str) -> None:
    basis = Basis.identity(12, 8).only(sides)
    with pytest.raises(UserError, match="lacks a side: calibrate it with sides=both"):
        SparseGradLinear.from_linear(nn.Linear(8, 12), basis, keep=3)


@pytest.mark.parametrize("shape", [(8, 12), (8, 8)])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda conv, basis: SparseGradLinear.from_linear(conv, basis, keep=3), "engine layer wraps .*use engine"),
        (lambda conv, basis: BlockLinear.from_linear(conv, basis, (2, 3)), "a block wraps .*use engine exact"),
        (lambda conv, _: LeanLinear(conv, drop_padding=True), "a lean linear wraps .*leave drop_padding"),
    ],
)
def test_no_wrapper_takes_a_conv1d(shape: tuple[int, int], make: Callable[..., nn.Module], message: str) -> None:
    """Its weight is (in, out): a square one would be transposed in silence."""
    with pytest.raises(UserError, match=message) as caught:
        make(Conv1D(shape[1], shape[0]), Basis.identity(*shape))
    assert "nn.Linear, not Conv1D" in str(caught.value)


def test_gradients_of_several_devices_are_summed_where_the_first_was() -> None:
    """As `device_map` spreads the blocks of one kind. `meta` stands for a second device: it takes any tensor."""
    grams = Grams()
    grams.add(torch.ones(12, 8, device="meta"))
    grams.add(torch.ones(12, 8))
    assert grams.count == 2
    for gram in (grams.out_gram, grams.in_gram):
        assert gram is not None
        assert gram.device.type == "meta"


def test_a_given_device_stays_that_of_the_sums() -> None:
    grams = Grams(device="meta", sides="in")
    for device in ("cpu", "meta"):
        grams.add(torch.ones(12, 8, device=device))
    assert grams.in_gram is not None
    assert grams.in_gram.device.type == "meta"


class Wrapped(nn.Module):
    """A network whose loss comes out as `give` says."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.give = nn.Linear(8, 12), nn.Linear(12, 8), give

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        output = self.down(self.up(x).tanh())
        return self.give(output.square().mean() if labels is None else (output - labels).square().mean())


NAMES = {"up": "up", "down": "down"}


def labelled(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(5, 8, generator=generator) for name in ("x", "labels")} for _ in range(count)]


def as_tuple(loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss, torch.zeros(5, 8)


def as_dict(loss: Tensor) -> dict[str, Tensor]:
    return {"logits": torch.zeros(5, 8), "loss": loss}


class Pair(NamedTuple):
    logits: Tensor
    loss: Tensor


@pytest.mark.parametrize("give", [as_tuple, as_dict, lambda loss: Pair(torch.zeros(5, 8), loss)])
def test_a_loss_is_found_wherever_the_trainer_would_find_it(give: Callable[[Tensor], Any]) -> None:
    """And the bases are those of a model that returns an object."""
    bases = []
    for way in (give, lambda loss: SimpleNamespace(loss=loss)):
        model = Wrapped(way)
        bases.append(calibrate(model, labelled(), {"up": [model.up], "down": [model.down]}, steps=2))
    for kind, basis in bases[0].items():
        assert torch.equal(basis.both()[0], bases[1][kind].both()[0])


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda loss: {"logits": loss, "score": loss},
            "for a batch of x, labels: return it as .*; it returned a dict of logits, score",
        ),
        (lambda loss: {}, "; it returned a dict of nothing"),
        (lambda loss: ("text", loss), "; it returned a tuple of str, Tensor"),
        (lambda loss: loss, "; it returned a Tensor"),
        (lambda loss: SimpleNamespace(loss=None), "; it returned a SimpleNamespace"),
    ],
)
def test_a_result_without_loss_is_named(give: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UserError, match=f"the model gives no loss .*{message}"):
        prepare(Wrapped(give), labelled(), target_modules=NAMES, density=0.1, calibration_steps=2)


def test_a_tuple_begins_with_the_loss_only_where_there_are_labels() -> None:
    """Else its first item is the logits; the Trainer asks for labels too."""
    batches = [{"x": batch["x"]} for batch in labelled()]
    with pytest.raises(
        UserError,
        match=r"no loss for a batch of x: give batches with labels, .*; it returned a tuple of Tensor, Tensor",
    ):
        prepare(Wrapped(as_tuple), batches, target_modules=NAMES, density=0.1, calibration_steps=2)
