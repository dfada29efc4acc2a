"""What the optimizer holds to in the corners: low precision, refused steps, hooks, a scaler."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from test_moments import basis, give_gradients, weights
from torch import nn

from sparsegrad import Basis, SparseGradAdamW, UserError
from sparsegrad.optim.selection import top_k_index


@pytest.mark.parametrize("rotated", [True, False])
def test_weight_decay_of_bfloat16_weights_adds_up(rotated: bool) -> None:
    """30 steps of lr 1e-3 and decay 3: 1.10 becomes 1.005; rounded to nearest it would stay 1.10."""
    groups = {"keep": 64, "basis": Basis.identity(64, 48) if rotated else None}
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.full((64, 48), 1.1).to(dtype))
        optimizer = SparseGradAdamW([{"params": [weight], **groups}], lr=1e-3, weight_decay=3.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            weight.grad = 1e-12 * torch.randn(64, 48, generator=generator).to(dtype)
            optimizer.step()
        means[dtype] = float(weight.detach().float().mean())
    assert means[torch.float32] == pytest.approx(1.1 * (1 - 3e-3) ** 30, abs=2e-3)
    assert means[torch.bfloat16] == pytest.approx(means[torch.float32], abs=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_of_finer_weights_is_one_product_before_the_change(dtype: torch.dtype) -> None:
    """To the bit, against the change of the same step without decay."""
    decayed, plain = weights(dtype=dtype), weights(dtype=dtype)
    group = {"keep": 9, "basis": basis()}
    give_gradients(decayed, 0)
    give_gradients(plain, 0)
    SparseGradAdamW([{"params": decayed, **group}], lr=1e-2, weight_decay=0.1).step()
    zeros = [nn.Parameter(torch.zeros_like(weight)) for weight in plain]
    give_gradients(zeros, 0)
    SparseGradAdamW([{"params": zeros, **group}], lr=1e-2).step()
    factor = 1 - torch.tensor(1e-2 * 0.1, dtype=dtype)  # of the weight's precision
    for weight, before, change in zip(decayed, plain, zeros, strict=True):
        assert torch.equal(weight, before * factor + change)


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def low_default(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("low_default")
@pytest.mark.parametrize("moments", ["dense", "support"])
def test_a_low_default_dtype_changes_nothing(moments: str) -> None:
    """bfloat16 cannot count beyond 256, and 1 - 1e-4 is 1 in it."""
    default, found = torch.get_default_dtype(), []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        parameters = weights(dtype=torch.float32)
        group = {"params": parameters, "keep": 9, "basis": basis(), "moments": moments}
        optimizer = SparseGradAdamW([group], lr=1e-3, weight_decay=0.1)
        for parameter in parameters:
            optimizer.state[parameter]["step"] = torch.tensor(300.0, dtype=torch.float32)
        for seed in range(3):
            give_gradients(parameters, seed)
            optimizer.step()
        found.append(parameters)
        assert optimizer.state[parameters[0]]["step"].item() == 303
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("low_default")
def test_a_step_count_of_a_low_default_dtype_is_loaded_as_float32() -> None:
    parameters = weights(dtype=torch.float32)
    optimizer = SparseGradAdamW([{"params": parameters, "keep": 9}])
    walked(parameters, optimizer, [0])
    state = optimizer.state_dict()
    for one in state["state"].values():
        one["step"] = torch.tensor(256.0)  # of the default dtype
    optimizer.load_state_dict(state)
    walked(parameters, optimizer, [1])
    assert optimizer.state[parameters[0]]["step"].item() == 257


@pytest.mark.parametrize("release", [False, True])
def test_a_compiled_step_is_an_eager_one(release: bool) -> None:
    found = []
    for compiled in (False, True):
        parameters = weights(dtype=torch.float32)
        optimizer = SparseGradAdamW([{"params": parameters, "keep": 9, "basis": basis()}], lr=1e-2)
        if release:
            optimizer.release_gradients()
        step = torch.compile(lambda optimizer=optimizer: optimizer.step()) if compiled else optimizer.step
        for factor in (1.0, 2.0):
            sum((weight * factor).cos().sum() for weight in parameters).backward()
            step()
            optimizer.zero_grad()
        found.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def walked(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seeds: list[int | None]) -> None:
    """A step for each seed; None: one that is refused."""
    for seed in seeds:
        give_gradients(parameters, seed or 0)
        if seed is None:
            parameters[0].grad[3, 2] = float("nan")
        optimizer.step()


@pytest.mark.parametrize("moments", ["dense", "support"])
@pytest.mark.parametrize("seeds", [[None, 1, 2], [1, None, 2, 3], [1, 2, None, None, 3, 4]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_refused_step_is_as_one_never_taken(moments: str, seeds: list[int | None], dtype: torch.dtype) -> None:
    """To the bit, also for the steps after it, whose bias correction counts."""
    group = {"keep": 9, "moments": moments, "basis": basis()}
    one, other = weights(dtype=dtype), weights(dtype=dtype)
    with_refused = SparseGradAdamW([{"params": one, **group}], lr=1e-2)
    without = SparseGradAdamW([{"params": other, **group}], lr=1e-2)
    walked(one, with_refused, seeds)
    walked(other, without, [seed for seed in seeds if seed is not None])
    assert with_refused.skipped_steps == seeds.count(None)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for mine, theirs in zip(with_refused.state.values(), without.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("moments", ["dense", "support"])
@pytest.mark.parametrize("fused", [True, None])
def test_after_a_refused_step_a_resumed_walk_goes_on_to_the_bit(moments: str, fused: bool | None) -> None:
    group = {"keep": 9, "moments": moments, "basis": basis()}
    whole, halves = weights(dtype=torch.float32), weights(dtype=torch.float32)
    walked(whole, SparseGradAdamW([{"params": whole, **group}], lr=1e-2, fused=fused), [1, None, 2, None, 3, 4])
    first = SparseGradAdamW([{"params": halves, **group}], lr=1e-2, fused=fused)
    walked(halves, first, [1, None, 2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SparseGradAdamW([{"params": halves, **group}], lr=1e-2, fused=fused)
    second.load_state_dict(torch.load(file, weights_only=True))
    walked(halves, second, [None, 3, 4])
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_calls_each_hook_once_whatever_was_made_before(sparse: bool, fused: bool) -> None:
    """torch wraps the step of AdamW's class when one is made: then the inner step must not call the hooks too."""
    parameters, rest = weights(), nn.Parameter(torch.ones(4))
    torch.optim.AdamW([rest])
    torch.optim.Adam([rest])
    groups = [{"params": parameters, "keep": 9}] if sparse else []
    optimizer, calls = SparseGradAdamW([*groups, {"params": [rest]}], lr=1e-2, fused=fused), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    give_gradients(parameters, 0)
    rest.grad = torch.ones(4)
    optimizer.step()
    assert calls == ["before", "after"]
    assert (rest < 1).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 31, 62, 119_999])
def test_no_entry_that_is_not_finite_escapes_the_selection(place: int, poison: float) -> None:
    """Whether the sample, every 31st entry, sees it or not."""
    gradient = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    gradient.view(-1)[place] = poison
    for keep in (1, 37, 1200):
        index = top_k_index(gradient, keep)
        assert place in index.tolist()
        others = gradient.abs().flatten()[index[index != place]].sort(descending=True).values
        finite = gradient.abs().flatten().nan_to_num(0, 0)
        assert torch.equal(others, finite.sort(descending=True).values[: keep - 1])


def test_a_step_without_rotation_is_refused_for_one_nan_that_the_sample_misses() -> None:
    weight = nn.Parameter(torch.ones(300, 400))
    optimizer = SparseGradAdamW([{"params": [weight], "density": 0.01}], lr=1e-2)
    weight.grad = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    weight.grad[0, 1] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert (weight == 1).all()


def test_released_gradients_with_a_scaler_are_refused_by_name_after_a_skipped_step() -> None:
    """The scaler sees the other parameters' gradients overflow, and never calls `step`."""
    network = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 2))
    released = {"params": [network[0].weight], "density": 0.1}
    optimizer = SparseGradAdamW([released, {"params": network[1].parameters()}], lr=1e-2)
    optimizer.release_gradients()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(network(torch.full((5, 8), 1e30)).square().sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(UserError, match=r"second backward pass before step.*GradScaler.*bfloat16 without one"):
        network(torch.ones(5, 8)).sum().backward()
