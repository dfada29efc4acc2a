"""Models that are called in unusual ways: differentiated twice, compiled, wrapped, on another default device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, bert
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsegrad import Basis, UserError, calibrate, load_adapter, prepare, save_adapter
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.orders import Order, rotated_gradient

FORCES = [{"x": torch.randn(8, 8), "forces": torch.randn(8, 8)} for _ in range(4)]
OPTIONS: dict[str, Any] = {"target_modules": ["up", "down"], "calibration_steps": 4, "density": 0.1}


class Energy(nn.Module):
    """Forces are the gradient of an energy by its input, so the loss is differentiated twice."""

    def __init__(self, find_forces: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.find_forces = nn.Linear(8, 16), nn.Linear(16, 1), find_forces

    def forward(self, x: Tensor, forces: Tensor) -> dict[str, Tensor]:
        found = self.find_forces(lambda one: self.down(torch.tanh(self.up(one))).sum(), x)
        return {"loss": (found - forces).square().mean()}


def by_autograd(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(energy(x), x, create_graph=True)[0]


def by_transforms(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = torch.func.vmap(torch.func.grad(energy))(x)
    return found


@pytest.mark.parametrize("find_forces", [by_autograd, by_transforms])
def test_the_remedy_for_losses_that_are_differentiated_twice_works(find_forces: Any) -> None:
    model = Energy(find_forces)
    with pytest.raises(UserError, match=r"rotation_order='gradient' \(calibrate: drop_padding=False\)"):
        prepare(copy.deepcopy(model), FORCES, **OPTIONS)
    optimizer = prepare(model, FORCES, rotation_order="gradient", **OPTIONS)
    model(**FORCES[0])["loss"].backward()
    before = model.up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.up.weight, before)


class Padded(nn.Module):
    """The loss leaves out every third token, as if it were padding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16).double(), nn.Linear(16, 8).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        is_real = (torch.arange(len(x)) % 3 != 0).to(x)[:, None]
        return {"loss": ((self.down(torch.tanh(self.up(x))) - 1).square() * is_real).sum()}


def test_the_basis_is_the_same_with_padding_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped, find_rows = [], LeanLinear.find_rows

    def watched(layer: Any, dy: Tensor) -> Any:
        found = find_rows(layer, dy)
        dropped.append(found[0] is not None)
        return found

    monkeypatch.setattr(LeanLinear, "find_rows", watched)
    model, batches = Padded(), [{"x": torch.randn(20, 8).double()} for _ in range(3)]
    linears = {"up": {"up": model.up}, "down": {"down": model.down}}
    lean, plain = (calibrate(model, batches, linears, 3, drop_padding=choice) for choice in (True, False))
    assert dropped == [True] * 6, "two linears, three batches; without drop_padding, no row is looked for"
    for kind, basis in plain.items():
        gradient = torch.randn(basis.shape).double()  # rotated, it is the same up to the sign of the bases' columns
        assert torch.allclose(lean[kind].rotate(gradient).abs(), basis.rotate(gradient).abs(), atol=1e-9)


class Plain(nn.Module):
    """Two linears in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, forces: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.down(torch.tanh(self.up(x))) - forces).square().mean()}


def test_a_compiled_model_is_calibrated_in_one_graph() -> None:
    model = torch.compile(Plain(), backend="aot_eager", fullgraph=True)
    assert prepare(model, FORCES, **OPTIONS).bases


def test_without_gradients_the_reason_is_named() -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(UserError, match="gradients are switched off"):
            prepare(bert(), BATCHES, calibration_steps=3)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> DistributedDataParallel:
    """A model inside DDP, without processes."""
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module: nn.Module.__init__(self))
    model = DistributedDataParallel(bert())
    model.module = bert()
    return model


def test_ddp_is_seen_inside_a_compiled_model(wrapped: DistributedDataParallel) -> None:
    with pytest.raises(UserError, match="prepare the model first and wrap it afterwards"):
        prepare(torch.compile(wrapped), BATCHES, calibration_steps=3, engine="fast")
    optimizer = prepare(torch.compile(wrapped), BATCHES, calibration_steps=3)
    assert optimizer.model is not None
    assert optimizer.model() is wrapped.module


def test_what_ddp_waits_for_is_not_frozen_inside_it(wrapped: DistributedDataParallel) -> None:
    options: dict[str, Any] = {"train_rest": False, "modules_to_save": ["classifier"], "calibration_steps": 3}
    with pytest.raises(UserError, match="prepare the model first and wrap it afterwards"):
        prepare(wrapped, BATCHES, **options)
    prepare(wrapped.module, BATCHES, **options)
    assert prepare(wrapped, BATCHES, **options), "nothing is left to freeze"


def test_a_rotated_adapter_loads_on_another_default_device(tmp_path: Path) -> None:
    model = bert()
    base = copy.deepcopy(model)
    optimizer = prepare(model, BATCHES, calibration_steps=3, lr=1e-2)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path, base, optimizer, tolerance=1e-3)
    there = copy.deepcopy(base)
    load_adapter(base, tmp_path).merge()
    with torch.device("meta"):
        load_adapter(there, tmp_path).merge()
    assert all(map(torch.equal, there.parameters(), base.parameters()))


def test_a_fused_step_marks_no_parameter_without_a_gradient_as_changed() -> None:
    used, other, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    optimizer = SparseGradAdamW([*used.parameters(), *other.parameters()], fused=True)
    later = other(x).sum()
    used(x).sum().backward()
    optimizer.step()
    later.backward()


def test_a_layer_checks_the_shape_of_its_basis() -> None:
    with pytest.raises(UserError, match="does not fit a linear of"):
        SparseGradLinear(torch.randn(9, 6), None, Basis.identity(4, 4), 3, "regular")


def gathering(size: int) -> Tensor:
    """An orthogonal matrix whose first column has equal entries: it gathers the norm of an equal token there."""
    mirror = torch.nn.functional.normalize(torch.eye(size)[0] - size**-0.5, dim=0)
    return torch.eye(size) - 2 * torch.outer(mirror, mirror)


def test_a_rotation_of_tokens_in_float16_does_not_overflow() -> None:
    """Each entry of the token is small, but float16 cannot hold its norm."""
    size = 4096
    x, dy = torch.full((1, size), 1500.0, dtype=torch.float16), torch.full((1, 2), 1e-3, dtype=torch.float16)
    U = gathering(size)
    expected = (dy.float().T @ x.float()) @ U
    found = rotated_gradient(dy, x, U, None, Order(inputs=True, outputs=False))
    assert torch.allclose(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_projection_of_tokens_in_float16_does_not_overflow() -> None:
    size, model = 1024, nn.Sequential()
    model.up = nn.Linear(size, 4)
    nn.init.zeros_(model.up.weight)
    bases = {"up": Basis(gathering(size), torch.eye(4))}
    prepare(model, None, ["up"], bases=bases, engine="fast", train_rest=False, modules_to_save=[])
    with torch.autocast("cpu", torch.float16):
        total = model.up(torch.full((1, size), 3000.0)).sum()
    total.backward()
    assert model.up.core.grad.isfinite().all()
    assert model.up.core.grad.abs().max() > 65504


def test_the_rotated_space_of_engine_layer_does_not_overflow_in_float16() -> None:
    size = 1024
    linear = nn.Linear(size, 4)
    nn.init.constant_(linear.weight, 1e-6)
    layer = SparseGradLinear.from_linear(linear, Basis(gathering(size), torch.eye(4)), keep=9)
    x = torch.full((2, size), 3000.0)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), linear(x), rtol=1e-2)
    y.sum().backward()
    assert layer.rotated_weight.grad.to_dense().isfinite().all()
