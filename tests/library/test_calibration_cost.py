"""What makes a calibration cheaper leaves its result alone, and its progress can be followed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from toy_bert import ToyBert
from toy_models import toy_batches

from sparsegrad import UserError, calibrate, find_mlp, prepare
from sparsegrad.calibration.grams import Grams
from sparsegrad.layers.lean import LeanLinear


@pytest.fixture
def model(small_bert: ToyBert) -> ToyBert:
    return small_bert.double()


def linears(model: nn.Module) -> dict[str, list[nn.Linear]]:
    return {kind: list(found.values()) for kind, found in find_mlp(model).items()}


class Watch:
    """Notes what is shown, as `tqdm` would."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int]] = []

    def __call__(self, items: Any, /, *, desc: str) -> Iterable[Any]:
        self.shown.append((desc, len(items)))
        return items  # type: ignore[no-any-return]


def test_progress_shows_the_batches_and_then_the_decompositions(model) -> None:
    for call in (
        lambda watch: calibrate(model, toy_batches("bert", 3), linears(model), 3, progress=watch),
        lambda watch: prepare(model, toy_batches("bert", 3), calibration_steps=3, keep=4, progress=watch),
    ):
        watch = Watch()
        call(watch)
        assert watch.shown == [("calibration", 3), ("decomposition", 2)]


def test_tqdm_fits_as_progress(model) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    calibrate(model, toy_batches("bert", 1), linears(model), 1, progress=lambda items, desc: tqdm(items, desc=desc))


@pytest.mark.parametrize("fails", [True, False])
def test_the_linears_are_lean_only_meanwhile(model, fails: bool) -> None:
    seen: list[type] = []
    found = [one for of in linears(model).values() for one in of]
    found[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    with pytest.raises(UserError, match="ran out of batches") if fails else nullcontext():
        calibrate(model, toy_batches("bert", 1), linears(model), 2 if fails else 1)
    assert set(seen) == {LeanLinear}
    assert {type(one) for one in found} == {nn.Linear}
    assert all("drop_padding" not in vars(one) for one in found)


@pytest.mark.parametrize(("out", "features"), [(300, 40), (40, 300), (130, 129), (1100, 20)])
def test_half_of_each_sum_gives_the_whole(out: int, features: int) -> None:
    grams = Grams()
    gradients = [torch.randn(out, features, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    for gradient in gradients:
        grams.add(gradient)
    for name, expected in (
        ("out_gram", sum(G @ G.T for G in gradients)),
        ("in_gram", sum(G.T @ G for G in gradients)),
    ):
        assert torch.allclose(grams._take_gram(name), expected, atol=1e-10)
    grams.add(gradients[0])  # and can be continued
    assert torch.allclose(grams._take_gram("in_gram"), sum(G.T @ G for G in [*gradients, gradients[0]]), atol=1e-10)
