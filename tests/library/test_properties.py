"""What holds for every shape, dtype, density and mishap; gradients of every autograd Function; compiled engines."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsegrad
from sparsegrad import Basis, SparseGradAdamW, SparseGradLinear, hosvd
from sparsegrad.layers.block import BlockLinear, _BlockLinear
from sparsegrad.layers.lean import LeanLinear, _LeanLinear
from sparsegrad.layers.rotated import _RotatedLinear
from sparsegrad.methods.meprop import keep_largest_

OUT, IN, TOKENS = 5, 4, 6
LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(out: int, features: int, seed: int = 0) -> Basis:
    return hosvd(draw(3, out, features, seed=seed))


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


@given(
    out=st.integers(1, 6),
    features=st.integers(1, 6),
    share=st.floats(0.01, 1),
    steps=st.lists(
        st.lists(st.sampled_from(["given", "twice", "missing", "tiny"]), min_size=3, max_size=3), max_size=4
    ),
    frozen=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=50, deadline=None)
def test_the_optimizer_is_the_method(
    out: int, features: int, share: float, steps: list[list[str]], frozen: bool, seed: int
) -> None:
    """Three weights of one kind: gradients that come, come in two passes, are missing or tiny; one may be frozen."""
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

ENGINES: dict[str, Callable[[nn.Linear, Basis, float], nn.Module]] = {
    "layer regular": lambda linear, basis, density: SparseGradLinear.from_linear(linear, basis, density=density),
    "layer sparse_dense": lambda linear, basis, density: SparseGradLinear.from_linear(
        linear, basis, density=density, backward="sparse_dense"
    ),
    "block": lambda linear, basis, density: BlockLinear.from_linear(linear, basis, (1, 1)),
    "lean": lambda linear, basis, density: LeanLinear(linear, drop_padding=True),
}
PRECISION = {torch.float64: 1e-10, torch.float32: 1e-4}


def gradient_of(layer: nn.Module) -> Tensor | None:
    """Of what trains in place of the weight."""
    for name in ("rotated_weight", "core", "weight"):
        if (parameter := getattr(layer, name, None)) is not None:
            return parameter.grad
    raise AssertionError


@pytest.mark.parametrize("engine", ENGINES)
@given(
    sizes=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    out=st.integers(1, 6),
    features=st.integers(1, 6),
    density=st.floats(0.03, 1),
    bias=st.booleans(),
    dtype=st.sampled_from(list(PRECISION)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_every_layer_computes_the_linear(
    engine: str, sizes: list[int], out: int, features: int, density: float, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """Outputs and input gradients, for inputs of any leading sizes: one vector, or none at all."""
    torch.manual_seed(seed)
    linear, basis = nn.Linear(features, out, bias, dtype=dtype), basis_of(out, features, seed).to(dtype=dtype)
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


@given(
    out=st.integers(1, 7),
    features=st.integers(1, 7),
    share=st.floats(0.01, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_meprop_keeps_the_largest_of_any_gradient(
    out: int, features: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    gradient = draw(out, features, seed=seed).to(dtype)
    keep, before = max(1, round(share * out * features)), gradient.clone()
    keep_largest_(gradient, keep)
    kept = gradient != 0
    assert kept.sum() <= keep
    assert torch.equal(gradient[kept], before[kept])
    if not kept.all():
        assert gradient[kept].abs().min() >= before[~kept].abs().max()


# Every autograd Function in float64, in each argument that has a gradient.


class Densify(torch.autograd.Function):
    """The identity; what engine `layer` gives as COO comes out dense, as gradcheck wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to_dense()


def rotated(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    basis, weight = basis_of(OUT, IN), Densify.apply(weight)
    keep = weight.numel()  # all of them: only then is it a gradient in the common sense
    return _RotatedLinear.apply(x, weight, basis.in_basis, basis.out_basis, keep, mode).sin()


def block(x: Tensor, bias: Tensor, core: Tensor) -> Tensor:
    """The core's part of W enters by value; its gradient is the Function's own."""
    basis = basis_of(OUT, IN)
    U, V = basis.in_basis[:, : core.shape[1]], basis.out_basis[:, : core.shape[0]]
    return _BlockLinear.apply(x, draw(OUT, IN, seed=5) + V @ core.detach() @ U.T, bias, core, U, V).sin()


def lean(x: Tensor, weight: Tensor, bias: Tensor, drop_padding: bool) -> Tensor:
    layer = LeanLinear(nn.Linear(IN, OUT).double(), drop_padding=drop_padding)
    return _LeanLinear.apply(x, weight, bias, layer).sin()


CHECKS: dict[str, tuple[type, Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer regular": (_RotatedLinear, lambda *a: rotated(*a, "regular"), [(TOKENS, IN), (OUT, IN)]),
    "layer sparse_dense": (_RotatedLinear, lambda *a: rotated(*a, "sparse_dense"), [(TOKENS, IN), (OUT, IN)]),
    "block": (_BlockLinear, block, [(TOKENS, IN), (OUT,), (3, 2)]),
    "lean": (_LeanLinear, lambda *a: lean(*a, False), [(TOKENS, IN), (OUT, IN), (OUT,)]),
    "lean, no padding": (_LeanLinear, lambda *a: lean(*a, True), [(TOKENS, IN), (OUT, IN), (OUT,)]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    _, function, shapes = CHECKS[name]
    arguments = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, tuple(arguments))


def test_every_autograd_function_is_checked() -> None:
    for module in pkgutil.walk_packages(sparsegrad.__path__, "sparsegrad."):
        if module.name.startswith(("sparsegrad.layers",)):
            importlib.import_module(module.name)
    found = {one for one in torch.autograd.Function.__subclasses__() if one.__module__.startswith("sparsegrad")}
    assert found == {function for function, _, _ in CHECKS.values()}


# torch.compile: traced by dynamo, gradients by AOT autograd; run by torch itself, as inductor takes a minute on a CPU.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(IN, OUT).double(), nn.Linear(OUT, IN).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def prepared(engine: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: Any = Block()
    bases = {"up": basis_of(OUT, IN), "down": basis_of(IN, OUT)}
    if engine in ENGINES:
        for name, basis in bases.items():
            setattr(model, name, ENGINES[engine](getattr(model, name), basis, 0.4))
    groups: list[dict[str, Any]] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            basis = bases["up" if parameter.shape == (OUT, IN) else "down"]
            matrix = parameter.dim() == 2 and engine in ("exact", "layer regular", "layer sparse_dense", "lean")
            rotate = basis if engine in ("exact", "lean") else None
            groups.append({"params": [parameter], **({"basis": rotate, "keep": 5} if matrix else {})})
    return model, SparseGradAdamW(groups, lr=LR)


@pytest.mark.parametrize("engine", ["exact", *ENGINES])
def test_every_engine_compiles_and_walks_the_same_path(engine: str) -> None:
    torch.compiler.reset()
    models = []
    for compiled in (False, True):
        model, optimizer = prepared(engine)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in range(4):
            optimizer.zero_grad()
            (called(draw(TOKENS, IN, seed=seed)) - 1).square().sum().backward()
            optimizer.step()
        models.append(model)
    eager, traced = (dict(model.named_parameters()) for model in models)
    assert all(torch.allclose(eager[name], traced[name], atol=1e-12) for name in eager)
    assert any(not torch.equal(eager[name], value) for name, value in prepared(engine)[0].named_parameters())
