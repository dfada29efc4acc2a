"""What holds for every shape, dtype, density and mishap: the optimizer is the method, each layer its linear."""

from __future__ import annotations

import random

import pytest
import torch
from engine_checks import BETAS, ENGINES, EPS, IN, LR, OUT, TOKENS, basis_of, draw
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradAdamW
from sparsegrad.methods.meprop import keep_largest_

# The optimizer against the method written down naively, one weight and one number at a time.


class Naive:
    """SparseGrad of one weight in float64: rotate, keep, masked Adam, rotate back."""

    def __init__(self, weight: Tensor, basis: Basis, keep: int) -> None:
        self.weight, self.basis, self.keep, self.steps = weight.clone(), basis, keep, 0
        self.first = torch.zeros(weight.numel()).double()
        self.second = torch.zeros(weight.numel()).double()

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        rotated = (self.basis.out_basis.T @ gradient @ self.basis.in_basis).flatten()
        update = torch.zeros_like(rotated)
        for i in rotated.abs().argsort(descending=True)[: self.keep].tolist():
            self.first[i] = BETAS[0] * self.first[i] + (1 - BETAS[0]) * rotated[i]
            self.second[i] = BETAS[1] * self.second[i] + (1 - BETAS[1]) * rotated[i] ** 2
            scale = LR * (1 - BETAS[1] ** self.steps) ** 0.5 / (1 - BETAS[0] ** self.steps)
            update[i] = scale * self.first[i] / (self.second[i].sqrt() + EPS)
        self.weight -= self.basis.out_basis @ update.view_as(gradient) @ self.basis.in_basis.T


STATES = ("given", "twice", "missing", "tiny")


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("frozen", [False, True])
def test_the_optimizer_is_the_method(frozen: bool, seed: int) -> None:
    """Three weights of one kind: gradients that come, come in two passes, are missing or tiny; one may be frozen."""
    drawn = random.Random(seed)
    out, features, share = drawn.randint(1, 6), drawn.randint(1, 6), drawn.uniform(0.01, 1)
    steps = [drawn.choices(STATES, k=3) for _ in range(4)]
    keep, basis = max(1, round(share * out * features)), basis_of(out, features, seed)
    weights = [nn.Parameter(draw(out, features, seed=seed + i)) for i in range(3)]
    weights[2].requires_grad_(not frozen)
    naive = [Naive(weight.detach(), basis, keep) for weight in weights]
    optimizer = SparseGradAdamW([{"params": weights, "basis": basis, "keep": keep}], lr=LR, betas=BETAS, eps=EPS)
    for number, states in enumerate(steps):
        optimizer.zero_grad()
        for i, (weight, own, state) in enumerate(zip(weights, naive, states, strict=True)):
            if state == "missing" or not weight.requires_grad:
                continue
            gradient = draw(out, features, seed=seed + 10 * number + i) * (1e-6 if state == "tiny" else 1)
            for _ in range(1 + (state == "twice")):  # accumulated
                (weight * gradient).sum().backward()
            own.step(gradient * (1 + (state == "twice")))
        optimizer.step()
    for weight, own in zip(weights, naive, strict=True):
        assert torch.allclose(weight.detach(), own.weight, atol=1e-10, rtol=0)
    assert not frozen or weights[2] not in optimizer.state


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_gradient_or_one_of_zeros_changes_nothing(dtype: torch.dtype, zero: bool) -> None:
    weight = nn.Parameter(draw(OUT, IN).to(dtype))
    before = weight.detach().clone()
    group = {"params": [weight], "basis": basis_of(OUT, IN), "keep": 3}
    optimizer = SparseGradAdamW([group], lr=LR, weight_decay=0.0 if zero else 0.1)
    weight.grad = torch.zeros_like(weight) if zero else None
    optimizer.step()
    assert torch.equal(weight, before)
    assert bool(optimizer.state) == zero


def test_a_weight_used_twice_gets_the_sum_of_both_uses() -> None:
    """A linear that the model calls in two places is one weight: selected once, from the whole gradient."""
    linear, basis = nn.Linear(IN, IN).double(), basis_of(IN, IN)
    naive = Naive(linear.weight.detach(), basis, 5)
    optimizer = SparseGradAdamW([{"params": [linear.weight], "basis": basis, "keep": 5}], lr=LR)
    for seed in range(3):
        optimizer.zero_grad()
        linear(linear(draw(TOKENS, IN, seed=seed)).tanh()).square().sum().backward()
        naive.step(linear.weight.grad)
        optimizer.step()
    assert torch.allclose(linear.weight.detach(), naive.weight, atol=1e-10, rtol=0)


# The layers of the engines against the linear that they stand for.

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-4}


def gradient_of(layer: nn.Module) -> Tensor | None:
    """Of what trains in place of the weight."""
    for name in ("rotated_weight", "core", "weight"):
        if (parameter := getattr(layer, name, None)) is not None:
            return parameter.grad
    raise AssertionError


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", [(), (0,), (1,), (3,), (0, 2), (2, 3)])
@pytest.mark.parametrize(
    ("out", "features", "density"), [(1, 1, 1.0), (1, 6, 0.2), (6, 1, 0.5), (3, 5, 0.03), (6, 6, 1.0)]
)
def test_every_layer_computes_the_linear(
    engine: str, sizes: tuple[int, ...], out: int, features: int, density: float, dtype: torch.dtype
) -> None:
    """Outputs and input gradients, for inputs of any leading sizes: one vector, or none at all."""
    seed = out + 10 * features + 100 * len(sizes)
    torch.manual_seed(seed)
    linear, basis = (
        nn.Linear(features, out, bias=bool(seed % 2), dtype=dtype),
        basis_of(out, features, seed).to(dtype=dtype),
    )
    layer = ENGINES[engine](linear, basis, max(density, 1 / (out * features)))
    x, y = [draw(*sizes, features, seed=seed).to(dtype).requires_grad_() for _ in range(2)]
    dy = draw(*sizes, out, seed=seed + 1).to(dtype)
    one, other = layer(x), linear(y)
    assert one.shape == other.shape == (*sizes, out)
    one.backward(dy)
    own_gradient = gradient_of(layer)
    assert own_gradient is not None
    other.backward(dy)
    tolerance = PRECISION[dtype]
    assert torch.allclose(one, other, atol=tolerance)
    assert torch.allclose(x.grad, y.grad, atol=tolerance)
    assert own_gradient.to_dense().isfinite().all()
    if 0 in sizes:
        assert not own_gradient.to_dense().any()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_batch_is_a_step_that_changes_nothing(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, OUT).double(), basis_of(OUT, IN), 0.3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    matrices = [{"params": [one], "keep": one.numel()} for one in parameters if one.dim() == 2]
    rest = [{"params": [one]} for one in parameters if one.dim() == 1]
    optimizer = SparseGradAdamW([*matrices, *rest], lr=LR)
    layer(draw(0, IN)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_used_twice_gets_both_gradients(engine: str) -> None:
    layer = ENGINES[engine](nn.Linear(IN, IN).double(), basis_of(IN, IN), 0.4)
    alone = []
    for seed in (1, 2):
        layer.zero_grad()
        layer(draw(TOKENS, IN, seed=seed)).sin().sum().backward()
        alone.append(gradient_of(layer).to_dense().clone())
    layer.zero_grad()
    (layer(draw(TOKENS, IN, seed=1)).sin().sum() + layer(draw(TOKENS, IN, seed=2)).sin().sum()).backward()
    assert torch.allclose(gradient_of(layer).to_dense(), alone[0] + alone[1], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("out", "features"), [(1, 1), (1, 7), (7, 1), (2, 3), (5, 4), (7, 7)])
def test_meprop_keeps_the_largest_of_any_gradient(out: int, features: int, share: float, dtype: torch.dtype) -> None:
    gradient = draw(out, features, seed=out + features).to(dtype)
    keep, before = max(1, round(share * out * features)), gradient.clone()
    keep_largest_(gradient, keep)
    kept = gradient != 0
    assert kept.sum() <= keep
    assert torch.equal(gradient[kept], before[kept])
    if not kept.all():
        assert gradient[kept].abs().min() >= before[~kept].abs().max()
