"""Gradients of every autograd Function, and engines under torch.compile."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_checks import ENGINES, IN, LR, OUT, TOKENS, basis_of, draw
from torch import Tensor, nn

import sparsegrad
from sparsegrad import SparseGradAdamW
from sparsegrad.layers.block_product import BlockProduct
from sparsegrad.layers.lean import LeanLinear, _LeanLinear
from sparsegrad.layers.rotated import _RotatedLinear

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
    return BlockProduct.apply(x, draw(OUT, IN, seed=5) + V @ core.detach() @ U.T, bias, core, U, V).sin()


def lean(x: Tensor, weight: Tensor, bias: Tensor, drop_padding: bool) -> Tensor:
    layer = LeanLinear(nn.Linear(IN, OUT).double(), drop_padding=drop_padding)
    return _LeanLinear.apply(x, weight, bias, None, None, layer).sin()


CHECKS: dict[str, tuple[type, Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer regular": (_RotatedLinear, lambda *a: rotated(*a, "regular"), [(TOKENS, IN), (OUT, IN)]),
    "layer sparse_dense": (_RotatedLinear, lambda *a: rotated(*a, "sparse_dense"), [(TOKENS, IN), (OUT, IN)]),
    "block": (BlockProduct, block, [(TOKENS, IN), (OUT,), (3, 2)]),
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
