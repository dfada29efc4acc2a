"""What holds for every layout, on a model of any origin: toys in torch alone, or transformers' own architectures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad import SparseGradAdamW, SparseGradLinear, calibrate, find_mlp, prepare
from sparsegrad.layers.replace import replace_module
from sparsegrad.optim.groups import param_groups

Batches = list[dict[str, Tensor]]


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_names(model: nn.Module, layout: str, shapes: dict[str, tuple[int, int]], count: int) -> None:
    """The layout is detected, and each kind has `count` linears of its shape."""
    detected, named = find_mlp(model), find_mlp(model, layout)
    assert {kind: list(found) for kind, found in detected.items()} == {kind: list(named[kind]) for kind in named}
    assert set(detected) == set(shapes)
    for kind, shape in shapes.items():
        assert len(detected[kind]) == count
        assert {tuple(linear.weight.shape) for linear in detected[kind].values()} == {shape}


def check_kept_entries(model: nn.Module, batches: Batches, keep: int = 7) -> None:
    """With all but the MLP weights frozen, n steps change `keep` to n * `keep` entries of each rotated weight."""
    model.requires_grad_(False)
    for found in find_mlp(model).values():
        for linear in found.values():
            linear.weight.requires_grad_(True)
    before = weights(model)
    optimizer = prepare(model, batches, keep=keep, lr=0.01, calibration_steps=2)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    for steps in (1, 2):
        step(model, optimizer, batches[steps])
        for name, now in weights(model).items():
            change = now - before[name]
            if name not in groups:
                assert not change.any(), name
                continue
            kept = int((groups[name]["basis"].rotate(change).abs() > 1e-9).sum())
            assert keep <= kept <= steps * keep


def check_engine_layer(exact: nn.Module, batches: Batches) -> None:
    """Three steps of engine `exact` and of the paper's layer lead to the same weights."""
    layered, linears = copy.deepcopy(exact), find_mlp(exact)
    bases = calibrate(exact, batches, {kind: found.values() for kind, found in linears.items()}, steps=2)
    optimizer = SparseGradAdamW(param_groups(exact, linears, bases, keep=9), lr=1e-2)
    rotated = []
    for kind, found in find_mlp(layered).items():
        for name, linear in found.items():
            layer = SparseGradLinear.from_linear(linear, bases[kind], keep=9)
            replace_module(layered, name, layer)
            rotated.append(layer.rotated_weight)
    own = {id(weight) for weight in rotated}
    rest = [parameter for parameter in layered.parameters() if id(parameter) not in own]
    other = SparseGradAdamW([{"params": rotated, "keep": 9}, {"params": rest}], lr=1e-2)
    for batch in batches[:3]:
        step(exact, optimizer, batch)
        step(layered, other, batch)
    for found in linears.values():
        for name, linear in found.items():
            assert torch.allclose(linear.weight, layered.get_submodule(name).to_linear().weight, atol=1e-9)


def check_conv1d(conv: nn.Module, batches: Batches) -> None:
    """A model with `Conv1D`s, and with linears in their place: one path, whose bases are each other's mirror."""
    linear = _replace_conv1d(copy.deepcopy(conv))
    optimizers = [prepare(model, batches, keep=11, lr=1e-2, calibration_steps=4) for model in (conv, linear)]
    mine, theirs = (optimizer.param_groups[0]["basis"] for optimizer in optimizers)
    leading = slice(0, 6)  # trailing directions hold no energy, and are arbitrary
    overlap = (mine.out_basis.T @ theirs.in_basis).abs().diagonal()[leading]
    assert torch.allclose(overlap, torch.ones(6).double(), atol=1e-6)
    for batch in batches:
        step(conv, optimizers[0], batch)
        step(linear, optimizers[1], batch)
    for found in find_mlp(conv).values():
        for name, module in found.items():
            assert torch.allclose(module.weight.T, linear.get_submodule(name).weight, atol=1e-9)


def _replace_conv1d(model: nn.Module) -> nn.Module:
    for found in find_mlp(model).values():
        for name, conv in found.items():
            linear = nn.Linear(*conv.weight.shape, dtype=conv.weight.dtype)
            linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.clone()), conv.bias
            replace_module(model, name, linear)
    return model
