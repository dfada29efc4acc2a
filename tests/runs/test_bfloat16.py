"""Products of bfloat16 on a processor without instructions for them: as exact as with them, gradients included."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import precision
from sparsegrad.trainer import bfloat16
from sparsegrad.trainer.bfloat16 import fast_bfloat16

CPU = torch.device("cpu")
ULP = 2.0**-7  # of bfloat16, relative: products that round once differ by no more


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(bfloat16, "has_bfloat16_products", lambda device: False)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matrix": (torch.matmul, [(5, 7), (7, 3)]),
    "batched": (torch.bmm, [(2, 5, 7), (2, 7, 3)]),
    "linear": (nn.functional.linear, [(2, 5, 7), (3, 7), (3,)]),
    "attention": (attention, [(2, 3, 5, 8)] * 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_equal_those_of_float32_rounded_once(name: str) -> None:
    torch.manual_seed(0)
    function, shapes = PRODUCTS[name]
    narrow = [draw(*shape).requires_grad_() for shape in shapes]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    expected = function(*wide)
    upstream = torch.randn_like(expected).bfloat16()
    with fast_bfloat16(CPU):
        found = function(*narrow)
        found.backward(upstream)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    expected.backward(upstream.float())
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == torch.bfloat16
        # Attention's backward pass starts from its rounded output.
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=ULP, atol=ULP * scale)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_autocast_finds_the_detour_in_every_mode(mode) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(4, 10, 64)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        native = linear(x)
        with fast_bfloat16(CPU):
            found = linear(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, native, rtol=ULP, atol=ULP)


def test_attention_in_inference_mode_takes_the_detour() -> None:
    tensors = [draw(2, 3, 5, 8) for _ in range(3)]
    with torch.inference_mode(), fast_bfloat16(CPU):
        found = attention(*tensors)
    assert torch.equal(found, attention(*(tensor.float() for tensor in tensors)).bfloat16())


def test_a_torch_without_onednn_answers_too(monkeypatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert not precision.has_bfloat16_products(CPU)


def test_float32_is_left_alone() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    with fast_bfloat16(CPU):
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32
        assert torch.mm(a.double(), b.double()).dtype == torch.float64
