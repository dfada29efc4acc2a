"""The lean linear: the same function and gradients, for less."""

import pytest
import torch
from engine_checks import ENGINES, basis_of
from torch import Tensor, nn

from sparsegrad import UserError
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.optim.rounding import add_stochastic

OUT, IN, TOKENS = 11, 7, 40


def data(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(4, TOKENS // 4, IN, dtype=dtype, requires_grad=True)
    dy = torch.randn(4, TOKENS // 4, OUT, dtype=dtype)
    dy[:, 6:] = 0  # padding
    return nn.Linear(IN, OUT).to(dtype), x, dy


@pytest.mark.parametrize("drop_padding", [True, False])
def test_gradients_are_the_linears(drop_padding: bool) -> None:
    linear, x, dy = data()
    expected = torch.autograd.grad(linear(x), (x, linear.weight, linear.bias), dy)
    lean = LeanLinear(linear, drop_padding=drop_padding)
    assert torch.equal(lean(x), linear(x))
    found = torch.autograd.grad(lean(x), (x, lean.weight, lean.bias), dy)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
    back = lean.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight


def test_a_refused_conversion_leaves_the_module_as_it_is() -> None:
    linear = nn.Linear(IN, OUT)
    with pytest.raises(UserError, match="give a floating dtype"):
        LeanLinear.convert(linear, save_dtype=torch.int32)
    assert type(linear) is nn.Linear
    with pytest.raises(UserError, match=r"wraps nn\.Linear, not ReLU"):
        LeanLinear.convert(nn.ReLU())  # type: ignore[arg-type]


def test_gradcheck() -> None:
    linear, x, _ = data()
    lean = LeanLinear(linear, drop_padding=True)
    assert torch.autograd.gradcheck(lean, (x[:1, :3].detach().requires_grad_(),))
    weight = linear.weight.detach().clone().requires_grad_()

    def of_weight(weight: Tensor) -> Tensor:
        return torch.func.functional_call(lean, {"weight": weight}, (x.detach(),))

    assert torch.autograd.gradcheck(of_weight, (weight,))


def test_inputs_kept_in_bfloat16_cost_half_and_round() -> None:
    linear, x, dy = data(torch.float32)
    lean = LeanLinear(linear, save_dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lean(x)
    assert sorted(str(tensor.dtype) for tensor in kept) == ["torch.bfloat16", "torch.float32"]  # x, and W itself
    dx, dW = torch.autograd.grad(y, (x, lean.weight), dy)
    exact_dx, exact_dW = torch.autograd.grad(linear(x), (x, linear.weight), dy)
    assert torch.allclose(dx, exact_dx, atol=1e-6)
    assert dW.dtype == torch.float32
    assert 0 < (dW - exact_dW).norm() / exact_dW.norm() < 0.01


@pytest.mark.parametrize("engine", ["lean", "layer regular", "block"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_inputs_of_other_dtypes_are_taken_or_refused_as_by_a_linear(
    dtype: torch.dtype, autocast: bool, grad: bool, engine: str
) -> None:
    linear, x = nn.Linear(IN, OUT), torch.ones(3, IN, dtype=dtype)
    layer = ENGINES[engine](linear, basis_of(OUT, IN).to(dtype=torch.float32), 0.5)
    found: list[object] = []
    for one in (linear, layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
            try:
                found.append(one(x).dtype)
            except RuntimeError as error:
                found.append(str(error))
    assert found[0] == found[1]


def test_nested_inputs_are_taken_without_a_gradient_and_refused_with_one() -> None:
    linear = nn.Linear(IN, OUT)
    lean = LeanLinear(linear)
    x = torch.nested.nested_tensor([torch.randn(2, IN), torch.randn(3, IN)], layout=torch.jagged)
    with pytest.raises(UserError, match=r"nested tensors.*rotation_order='gradient'"):
        lean(x)
    with torch.no_grad():
        assert torch.equal(lean(x).values(), linear(x).values())


def test_a_dtype_that_is_no_number_with_a_point_is_named() -> None:
    with pytest.raises(UserError, match=r"save_dtype=torch.int8 .*floating"):
        LeanLinear(nn.Linear(3, 2), save_dtype=torch.int8)


def test_small_changes_of_bfloat16_weights_add_up() -> None:
    """1,000 changes of a thousandth: to the nearest none is seen; at random the drift is there, within its spread."""
    torch.manual_seed(0)
    nearest, random = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    change = torch.full((4096,), 1e-3)
    for _ in range(1000):
        nearest.add_(change.bfloat16())
        add_stochastic(random, change, torch.randn(3))
    assert (nearest == 1).all()
    assert abs(float(random.float().mean()) - 2) < 0.005
    exact = torch.zeros(3)
    add_stochastic(exact, torch.tensor([0.1, -0.2, 0.3]), torch.randn(3))
    assert torch.equal(exact, torch.tensor([0.1, -0.2, 0.3]))
