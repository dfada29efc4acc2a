"""The layer of engine `fast`: the core gets the leading block of the rotated gradient; the function stays a linear."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from sparsegrad import UserError
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.common import core_gradient, core_shape
from sparsegrad.layers.replace import share_bases, use_blocks

OUT, IN, CORE = 11, 7, (4, 3)


def data(tokens: int = 13) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(tokens, OUT, dtype=torch.float64)


def train(layer: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        x, target = data()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_are_the_linears_and_the_leading_block_of_the_rotated_one(linear, basis) -> None:
    layer, (x, dy) = BlockLinear.from_linear(linear, basis, CORE), data()
    dx, db = torch.autograd.grad(linear(x), (x, linear.bias), dy, retain_graph=True)
    linear(x).backward(dy)
    x.grad = None
    layer(x).backward(dy)
    assert torch.allclose(layer(x), linear(x), atol=1e-12)
    assert torch.allclose(x.grad, dx, atol=1e-12)
    assert torch.allclose(layer.bias.grad, db, atol=1e-12)
    block = basis.rotate(linear.weight.grad)[: CORE[0], : CORE[1]]
    assert torch.allclose(layer.core.grad, block, atol=1e-12)


def test_it_trains_as_the_explicit_parametrization_does(linear, basis) -> None:
    """Against autograd through W + V_c core U_r^T, 20 steps of AdamW."""

    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Parameter(torch.zeros(CORE, dtype=torch.float64))
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            V_c, U_r = basis.out_basis[:, : CORE[0]], basis.in_basis[:, : CORE[1]]
            return nn.functional.linear(x, linear.weight.detach() + V_c @ self.core @ U_r.T, self.bias)

    layer, explicit = BlockLinear.from_linear(linear, basis, CORE), Explicit()
    train(layer, 20)
    train(explicit, 20)
    assert torch.allclose(layer.core, explicit.core, atol=1e-10)
    assert torch.allclose(layer(data()[0]), explicit(data()[0]), atol=1e-10)
    assert layer.core.abs().max() > 1e-2


def test_with_all_directions_the_core_sees_the_whole_gradient(linear, basis) -> None:
    layer, (x, dy) = BlockLinear.from_linear(linear, basis, (OUT, IN)), data()
    layer(x).backward(dy)
    linear(x).backward(dy)
    assert torch.allclose(basis.unrotate(layer.core.grad), linear.weight.grad, atol=1e-12)


def test_only_the_rotated_input_is_kept_for_the_backward_pass(linear, basis) -> None:
    """The saving in activations: of the input's size (tokens, in) nothing is saved, only (tokens, r)."""
    layer, saved = BlockLinear.from_linear(linear, basis, CORE), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(data(tokens=500)[0])
    assert {tuple(tensor.shape) for tensor in saved if 500 in tensor.shape} == {(500, CORE[1])}


def test_to_linear_has_the_trained_function_and_the_source_is_untouched(linear, basis) -> None:
    before, layer = linear.weight.clone(), BlockLinear.from_linear(linear, basis, CORE)
    train(layer, 3)
    assert torch.allclose(layer.to_linear()(data()[0]), layer(data()[0]), atol=1e-12)
    assert torch.equal(linear.weight, before)


def test_state_dict_goes_on_where_it_was(linear, basis) -> None:
    layer = BlockLinear.from_linear(linear, basis, CORE)
    train(layer, 3)
    with torch.no_grad():
        layer.core.add_(1e-2)
    state = copy.deepcopy(layer.state_dict())  # before the merge of this change
    assert not state["core"].equal(state["merged"])
    fresh = BlockLinear.from_linear(linear, basis, CORE)
    fresh.load_state_dict(state)
    assert torch.allclose(fresh(data()[0]), layer(data()[0]), atol=1e-14)


def test_autocast_and_accumulation(linear, basis) -> None:
    layer, (x, dy) = BlockLinear.from_linear(linear.float(), basis, CORE), data()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    y.float().backward(dy.float())
    once = layer.core.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.float()).float().backward(dy.float())
    assert layer.core.grad.dtype == torch.float32
    assert torch.allclose(layer.core.grad, 2 * once, rtol=1e-3)


def test_the_block_has_the_asked_share_of_entries() -> None:
    assert core_shape((3072, 768), 0.01) == (307, 77)
    assert core_shape((3, 3), 1.0) == (3, 3)
    assert core_shape((4, 4), 1e-6) == (1, 1)


def test_bad_input_is_named(linear, basis) -> None:
    with pytest.raises(UserError, match=r"in directions=8 .* to 7"):
        BlockLinear.from_linear(linear, basis, (4, 8))
    with pytest.raises(UserError, match=r"basis for \(11, 7\) does not fit a linear of \(7, 11\)"):
        BlockLinear.from_linear(nn.Linear(OUT, IN), basis, CORE)
    with pytest.raises(UserError, match="lacks a side: calibrate it with sides=both"):
        BlockLinear.from_linear(linear, basis.only("in"), CORE)
    with pytest.raises(UserError, match=r"weight of a block in torch.float16 .* float32, .* or in bfloat16"):
        BlockLinear.from_linear(copy.deepcopy(linear).half(), basis, CORE)
    with pytest.raises(UserError, match="density=0"):
        core_shape((4, 4), 0)


def test_the_core_gradient_is_the_same_in_either_order() -> None:
    T, m, r = 50, 12, 3
    dy, x_r = torch.randn(T, m, dtype=torch.float64), torch.randn(T, r, dtype=torch.float64)
    for c in (1, 2, 11, 12):
        V_c = torch.randn(m, c, dtype=torch.float64)
        assert torch.allclose(core_gradient(dy, x_r, V_c), (dy @ V_c).T @ x_r, atol=1e-12)


def test_autocast_does_not_round_what_is_merged(linear, basis) -> None:
    layer = BlockLinear.from_linear(linear.float(), basis, CORE)
    change = torch.randn(CORE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        layer.core.copy_(change)
    with torch.autocast("cpu", torch.bfloat16):
        layer(data()[0].float())
    wanted = basis.out_basis[:, : CORE[0]].float() @ change @ basis.in_basis[:, : CORE[1]].float().T
    assert torch.allclose(layer.weight - linear.weight, wanted, atol=1e-5)


def test_who_holds_the_old_linears_holds_no_second_copy(linear, basis) -> None:
    """As `run.py` does with the linears that it has found."""

    class Own(nn.Linear):
        """A subclass, which is replaced; an `nn.Linear` is converted in place."""

    linear.__class__ = Own
    model, weight, bias = nn.Sequential(linear), linear.weight.data_ptr(), linear.bias
    blocks = use_blocks(model, {"only": {"0": linear}}, {"only": basis}, 0.5)
    assert blocks["only"]["0"] is model[0] is not linear
    assert model[0].weight.data_ptr() == linear.weight.data_ptr() == weight
    assert bias is None or model[0].bias.data_ptr() == bias.data_ptr()


def test_layers_of_one_kind_hold_their_basis_once(linear, basis) -> None:
    layers = [BlockLinear.from_linear(linear, basis, CORE) for _ in range(3)]
    before = layers[2](data()[0])
    share_bases(layers)
    assert (
        len({layer.out_basis.data_ptr() for layer in layers})
        == len({layer.in_basis.data_ptr() for layer in layers})
        == 1
    )
    assert torch.equal(layers[2](data()[0]), before)


def test_checkpointing_and_clipping(linear, basis) -> None:
    """Activations computed twice give the same core gradient; clipping sees and scales it."""
    plain, twice = (BlockLinear.from_linear(linear, basis, CORE) for _ in range(2))
    for layer in (plain, twice):
        train(layer, 2)
        x, dy = data()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if layer is twice else layer(x)
        y.backward(dy)
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        assert norm > 0.5
    assert torch.allclose(twice.core.grad, plain.core.grad, atol=1e-14)
    norms = [parameter.grad.norm() for parameter in plain.parameters() if parameter.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.5, rel=1e-5)


def test_a_scaled_loss_is_unscaled_and_an_overflow_skipped(linear, basis) -> None:
    layer = BlockLinear.from_linear(linear.float(), basis, CORE)
    optimizer, scaler = torch.optim.SGD([layer.core], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    (x, dy), before = data(), layer.core.clone()
    scaler.scale((layer(x.float()) * dy.float()).sum()).backward()
    expected = layer.core.grad / 1024
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(layer.core, before - expected, rtol=1e-5)
    moved = layer.core.clone()
    layer.core.grad = torch.full_like(layer.core, torch.inf)
    scaler.step(optimizer)
    assert torch.equal(layer.core, moved)


def test_small_steps_reach_a_bfloat16_weight(linear, basis) -> None:
    """400 steps of the core, each below what a bfloat16 weight resolves: the weight drifts with it all the same."""
    torch.manual_seed(0)
    layer = BlockLinear.from_linear(linear.bfloat16(), basis, (OUT, IN))
    before, x = layer.weight.float(), torch.zeros(1, IN, dtype=torch.bfloat16)
    assert layer.core.dtype == torch.float32
    direction = torch.randn(OUT, IN)
    nearest = before.bfloat16()
    for _ in range(400):
        with torch.no_grad():
            layer.core += 2e-4 * direction
        layer(x)  # merges
        V, U = layer.out_basis.float(), layer.in_basis.float()
        nearest += (V @ (2e-4 * direction) @ U.T).bfloat16()
    wanted = V @ layer.core.detach() @ U.T
    kept = ((layer.weight.float() - before) * wanted).sum() / wanted.square().sum()
    lost = ((nearest.float() - before) * wanted).sum() / wanted.square().sum()
    assert kept == pytest.approx(1, abs=0.1)
    assert lost < 0.5


def test_under_autocast_the_frozen_weight_is_cast_once_after_each_merge(linear, basis) -> None:
    layer = BlockLinear.from_linear(linear, basis, CORE).float()
    x = data()[0].detach().float()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        return layer._cast[1]

    first = forward()
    assert first.dtype == torch.bfloat16
    assert forward() is first
    assert "_cast" not in vars(copy.deepcopy(layer))
    with torch.no_grad():
        layer.core.add_(1)
    assert torch.equal(forward(), layer.weight.bfloat16())
    assert not torch.equal(forward(), first)
    layer.load_state_dict({name: torch.zeros_like(value) for name, value in layer.state_dict().items()})
    assert not forward().any()
    layer(x)  # without autocast nothing is cast
    assert layer._cast[1] is not None


def test_nested_inputs_are_taken_without_a_gradient_and_refused_with_one(linear, basis) -> None:
    """As by engine `exact`; what has changed in the core is merged first."""
    layer = BlockLinear.from_linear(linear, basis, CORE)
    rows = [torch.randn(2, IN, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with torch.no_grad():
        layer.core.add_(0.1)
        assert torch.allclose(layer(x).values(), layer(torch.cat(rows)), atol=1e-12)
    assert layer.merged.equal(layer.core)
    with pytest.raises(UserError, match="nested tensors"):
        layer(x)
