"""Gradients that the optimizer releases in the backward pass: the same path, and their memory is free."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from optim_cases import IN, groups
from optim_cases import network as small_network
from torch import nn

from sparsegrad import SparseGradAdamW, UserError


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def optimizer_of(network: nn.Sequential) -> SparseGradAdamW:
    linears = [network[0].weight, network[2].weight]
    rest = [p for p in network.parameters() if all(p is not weight for weight in linears)]
    return SparseGradAdamW([{"params": [w], "density": 0.1} for w in linears] + [{"params": rest}], lr=1e-2)


def test_gradients_are_released_by_one_hook_each() -> None:
    model = small_network()
    optimizer = SparseGradAdamW(groups(model, keep=3))
    optimizer.release_gradients()
    optimizer.release_gradients()
    for _ in range(2):
        model(torch.randn(5, IN, dtype=torch.float64)).sum().backward()
        released = [weight for group in optimizer.param_groups if group["keep"] for weight in group["params"]]
        assert released
        assert all(weight.grad is None for weight in released)
        optimizer.step()


def test_released_gradients_walk_the_same_path_and_are_gone() -> None:
    ordinary, released = model(), model()
    one, other = optimizer_of(ordinary), optimizer_of(released)
    other.release_gradients()
    for seed in range(6):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).double()
        for network, optimizer in ((ordinary, one), (released, other)):
            network(x).square().sum().backward()
            assert (network[0].weight.grad is None) == (network is released)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), released.parameters(), strict=True))


def test_released_gradients_move_by_the_groups_of_a_loaded_state() -> None:
    """Loading replaces the groups, and schedules change the rate of those."""
    ordinary, released = model(), model()
    one, other = optimizer_of(ordinary), optimizer_of(released)
    other.release_gradients()
    for network, optimizer in ((ordinary, one), (released, other)):
        optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        network(torch.ones(2, 8).double()).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), released.parameters(), strict=True))


def test_a_model_with_released_gradients_can_be_freed() -> None:
    network = model()
    optimizer = optimizer_of(network)
    optimizer.release_gradients()
    network(torch.ones(2, 8).double()).sum().backward()
    optimizer.step()
    gone = weakref.ref(optimizer), weakref.ref(network[0])
    del optimizer, network
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_released_gradients_cannot_be_accumulated() -> None:
    network = model()
    optimizer = optimizer_of(network)
    optimizer.release_gradients()
    x = torch.randn(5, 8).double()
    network(x).sum().backward()
    with pytest.raises(UserError, match="a second backward pass before step"):
        network(x).sum().backward()
