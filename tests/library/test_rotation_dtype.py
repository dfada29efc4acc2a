"""Rotation in bfloat16: how much it rounds, and what lacks it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import Basis, UserError, hosvd, prepare
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.optim.orders import ORDERS
from sparsegrad.optim.selection import top_k_index

OUT, IN, TOKENS = 256, 64, 200
NAMES = {"up": "0", "down": "2"}


def has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN))


def tokens(seed: int) -> Tensor:
    """A few strong directions over noise, as in the activations of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(6, IN, generator=torch.Generator().manual_seed(99)) * torch.logspace(1, -1, 6)[:, None]
    noise = 0.1 * torch.randn(TOKENS, IN, generator=generator)
    return torch.randn(TOKENS, 6, generator=generator) @ strong + noise


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    target = x.roll(1, -1)
    (model(x) - target).square().mean().backward()
    return [parameter.grad.detach() for parameter in model.parameters() if parameter.dim() == 2]


@pytest.fixture
def supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any CPU: torch emulates bfloat16 products where the hardware lacks them, with the same rounding."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.parametrize("order", ORDERS)
def test_almost_all_kept_positions_are_those_of_float64(order: str, supported: None) -> None:
    """Bases from the HOSVD of the model's own gradients, the top 1 %, averaged over batches and weights.

    The positions that differ are those of the smallest kept entries: they hold next to no energy.
    """
    plain = network()
    stacks = list(zip(*(gradients(plain, tokens(seed)) for seed in range(6)), strict=True))
    bases = {kind: hosvd(stack) for kind, stack in zip(NAMES, stacks, strict=True)}
    exact = copy.deepcopy(plain).double()
    shares, errors, lost = {}, {}, {}
    for dtype in (None, torch.bfloat16):
        model = network()
        optimizer = prepare(model, None, NAMES, bases=bases, rotation_order=order, rotation_dtype=dtype)
        agreements = []
        for seed in range(10, 14):
            references = gradients(exact, tokens(seed).double())
            gradients(model, tokens(seed))
            for group, reference in zip(optimizer.param_groups, references, strict=False):
                weight, basis = group["params"][0], group["basis"]
                rotated = basis.to(dtype=torch.float64).rotate(reference)
                found = rotate_as_the_step(group, weight)
                keep = round(0.01 * rotated.numel())
                kept, wanted = (set(top_k_index(one, keep).tolist()) for one in (found, rotated))
                agreements.append(len(kept & wanted) / keep)
                energy = rotated.flatten().square()
                missed = 1 - float(energy[list(kept)].sum() / energy[list(wanted)].sum())
                lost[dtype] = max(lost.get(dtype, 0), missed)
                errors[dtype] = max(errors.get(dtype, 0), float((found - rotated).norm() / rotated.norm()))
        shares[dtype] = sum(agreements) / len(agreements)
    assert shares[None] > 0.995
    assert shares[torch.bfloat16] > 0.9
    assert lost[torch.bfloat16] < 1e-4
    assert errors[None] < 1e-4
    assert 1e-4 < errors[torch.bfloat16] < 0.01


def rotate_as_the_step(group: dict[str, Any], weight: Tensor) -> Tensor:
    from sparsegrad.optim.selection import _rotate

    return _rotate(group, weight, weight.grad[None])[0][0].double()


@pytest.mark.parametrize("order", ["auto", "gradient"])
def test_it_trains_and_the_weights_stay_in_their_dtype(order: str, supported: None) -> None:
    models = {}
    bases = {"up": Basis.identity(OUT, IN), "down": Basis.identity(IN, OUT)}
    for dtype in (None, torch.bfloat16):
        model = models[dtype] = network()
        optimizer = prepare(model, None, NAMES, lr=1e-3, bases=bases, rotation_order=order, rotation_dtype=dtype)
        before = [float((model(tokens(0)) - 1).square().mean())]
        for seed in range(20):
            optimizer.zero_grad()
            (model(tokens(seed)) - 1).square().mean().backward()
            optimizer.step()
        assert float((model(tokens(0)) - 1).square().mean()) < before[0]
        assert model[0].weight.dtype == torch.float32
        assert optimizer.bases["up"].dtype == torch.float32
    change = [model[0].weight - network()[0].weight for model in models.values()]
    assert 0 < (change[0] - change[1]).norm() / change[0].norm() < 0.2


def test_hardware_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    with pytest.raises(UserError, match=r"rotation_dtype=torch.bfloat16 needs .*this cpu lacks .*AVX512-BF16.*None"):
        prepare(network(), [], NAMES, rotation_dtype=torch.bfloat16)


def test_other_dtypes_are_named() -> None:
    with pytest.raises(UserError, match=r"rotation_dtype=torch.float16 .*torch.bfloat16"):
        prepare(network(), [], NAMES, rotation_dtype=torch.float16)
    with pytest.raises(UserError, match=r"method.rotation_dtype=fp16 .*bf16"):
        SparseGrad(rotation_dtype="fp16")
    with pytest.raises(UserError, match=r"method.rotation_dtype=bf16 does not belong to method.engine=layer"):
        SparseGrad(rotation_dtype="bf16", engine="layer")


@pytest.mark.skipif(not has_bfloat16(), reason="no bfloat16 products on this CPU")
def test_it_is_accepted_where_the_hardware_has_it() -> None:
    bases = {"up": Basis.identity(OUT, IN), "down": Basis.identity(IN, OUT)}
    prepare(network(), None, NAMES, bases=bases, rotation_dtype=torch.bfloat16)
