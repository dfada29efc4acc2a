"""Engine `layer`: the layer computes what the linear did, and its gradient is the kept part of the rotated one."""

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradLinear, UserError
from sparsegrad.layers.rotated import BACKWARDS

OUT, IN, TOKENS = 11, 7, 13


def tokens(padded: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs (tokens, in) that require a gradient, and an output gradient whose last rows are padding: zero."""
    torch.manual_seed(2)
    dy = torch.randn(TOKENS, OUT, dtype=torch.float64)
    dy[TOKENS - padded :] = 0
    return torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True), dy


@pytest.mark.parametrize("backward", BACKWARDS)
def test_output_and_input_gradient_equal_the_linears(linear, basis, backward) -> None:
    layer = SparseGradLinear.from_linear(linear, basis, keep=5, backward=backward)
    x, dy = tokens()
    expected = torch.autograd.grad(linear(x), x, dy)[0]
    assert torch.allclose(layer(x), linear(x), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(layer(x), x, dy)[0], expected, atol=1e-12)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("keep", [1, 5, OUT * IN])
def test_weight_gradient_is_the_largest_entries_of_the_rotated_gradient(linear, basis, backward, keep) -> None:
    layer = SparseGradLinear.from_linear(linear, basis, keep=keep, backward=backward)
    x, dy = tokens()
    layer(x).backward(dy)
    linear(x).backward(dy)
    rotated = basis.rotate(linear.weight.grad)
    threshold = rotated.abs().flatten().topk(keep).values[-1]
    expected = torch.where(rotated.abs() >= threshold, rotated, 0)
    assert layer.rotated_weight.grad.is_sparse
    assert layer.rotated_weight.grad._nnz() == keep
    assert torch.allclose(layer.rotated_weight.grad.to_dense(), expected, atol=1e-12)
    assert torch.allclose(layer.bias.grad, linear.bias.grad, atol=1e-12)


def test_sparse_dense_backward_equals_regular_exactly() -> None:
    """Whole numbers and a permutation as basis: every product is exact, so the gradients must be equal to the bit."""
    basis = Basis(torch.eye(IN)[torch.randperm(IN)], torch.eye(OUT)[torch.randperm(OUT)])
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-5, 6, (OUT, IN)))
    dy = torch.randint(-5, 6, (TOKENS, OUT)).float() * (torch.arange(TOKENS) < 9)[:, None]
    found = []
    for backward in BACKWARDS:
        layer = SparseGradLinear.from_linear(linear, basis, density=1.0, backward=backward)
        x = torch.arange(TOKENS * IN).view(TOKENS, IN).remainder(5).float().requires_grad_()
        layer(x).backward(dy)
        found.append((x.grad, layer.rotated_weight.grad.to_dense(), layer.bias.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_pass_gradcheck(linear, basis, backward) -> None:
    """With every entry kept the layer is an ordinary differentiable function."""
    layer = SparseGradLinear.from_linear(linear, basis, density=1.0, backward=backward)

    def function(x: Tensor) -> Tensor:
        return layer(x).sin()

    assert torch.autograd.gradcheck(function, (tokens()[0],))


def test_to_linear_comes_back(linear, basis) -> None:
    back = SparseGradLinear.from_linear(linear, basis, density=0.1).to_linear()
    assert torch.allclose(back.weight, linear.weight, atol=1e-12)
    assert torch.equal(back.bias, linear.bias)


def test_a_linear_without_bias_and_inputs_of_any_shape(basis) -> None:
    linear = nn.Linear(IN, OUT, bias=False).double()
    layer = SparseGradLinear.from_linear(linear, basis, keep=3)
    assert layer.to_linear().bias is None
    for shape in [(IN,), (2, IN), (2, 3, IN), (0, IN)]:
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.allclose(layer(x), linear(x), atol=1e-12)


def test_wrapping_leaves_the_linear_alone(linear, basis) -> None:
    before = linear.weight.clone(), linear.bias.clone()
    layer = SparseGradLinear.from_linear(linear, basis, keep=3)
    with torch.no_grad():
        layer.bias.add_(1)
        layer.rotated_weight.add_(1)
    assert torch.equal(linear.weight, before[0])
    assert torch.equal(linear.bias, before[1])


def test_autocast_multiplies_in_bfloat16_and_trains_float32(linear, basis) -> None:
    layer = SparseGradLinear.from_linear(linear.float(), basis, keep=5)
    x, dy = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), linear.double()(x), atol=0.1)
    y.float().backward(dy.float())
    assert layer.rotated_weight.grad.dtype == torch.float32
    assert layer.rotated_weight.grad.coalesce()._nnz() == 5


def test_a_frozen_weight_gets_no_gradient(linear, basis) -> None:
    layer = SparseGradLinear.from_linear(linear, basis, keep=5)
    layer.rotated_weight.requires_grad_(False)
    x, dy = tokens()
    layer(x).backward(dy)
    assert layer.rotated_weight.grad is None
    assert x.grad is not None


def test_state_dict_has_no_copy_of_the_basis(linear, basis) -> None:
    assert set(SparseGradLinear.from_linear(linear, basis, keep=5).state_dict()) == {"rotated_weight", "bias"}


def test_bad_input_is_named(linear, basis) -> None:
    with pytest.raises(UserError, match="exactly one"):
        SparseGradLinear.from_linear(linear, basis)
    with pytest.raises(UserError, match=r"keep=78 .* to 77"):
        SparseGradLinear.from_linear(linear, basis, keep=OUT * IN + 1)
    with pytest.raises(UserError, match="density=0 "):
        SparseGradLinear.from_linear(linear, basis, density=0)
    with pytest.raises(UserError, match="keeps no entry"):
        SparseGradLinear.from_linear(linear, basis, density=1e-6)
    with pytest.raises(UserError, match="backward=magic"):
        SparseGradLinear.from_linear(linear, basis, keep=3, backward="magic")
    with pytest.raises(UserError, match=r"basis for \(11, 7\) does not fit a linear of \(7, 11\)"):
        SparseGradLinear.from_linear(nn.Linear(OUT, IN), basis, keep=3)


def test_weight_is_the_plain_one_and_a_copy(linear, basis) -> None:
    layer = SparseGradLinear.from_linear(linear, basis, keep=5)
    assert torch.allclose(layer.weight, linear.weight, atol=1e-12)
    assert layer.weight.dtype == linear.weight.dtype
    layer.weight.zero_()
    assert torch.allclose(layer.weight, linear.weight, atol=1e-12)
    assert "weight" not in layer.state_dict()
