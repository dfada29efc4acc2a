"""The rotated gradient in every order of products, and everything that a loop does with `weight.grad`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsegrad import Basis, SparseGradAdamW, calibrate, prepare, to_linears
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.optim.orders import FIXED_ORDERS, ORDERS, cheapest_order, rotated_gradient

OUT, IN = 12, 8
NAMES = {"up": "up", "down": "down"}
# Token counts for which `auto` takes each order: below 8, below 12, and above; and none at all.
COUNTS = (5, 9, 40, 0)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q


def bases() -> dict[str, Basis]:
    U, V = orthogonal(IN, 1), orthogonal(OUT, 2)
    return {"up": Basis(U, V), "down": Basis(V, U)}


class Network(nn.Module):
    """Two linears, applied `depth` times each."""

    def __init__(self, depth: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.depth = nn.Linear(IN, OUT), nn.Linear(OUT, IN), depth
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(self.depth):
            x = x[step:] + self.down(torch.tanh(self.up(x[step:])))  # another number of tokens each time
        return x


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(seed)).double()


def optimizer_for(model: nn.Module, order: str, **options: Any) -> SparseGradAdamW:
    return prepare(model, None, NAMES, lr=1e-2, keep=9, bases=bases(), rotation_order=order, **options)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    weight = (torch.arange(x.shape[0]) % 3 != 0).to(x)[:, None]  # every third token is padding
    out = model(x)
    return ((out - 1).square() * weight[-len(out) :]).sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, counts: tuple[int, ...] = COUNTS * 2) -> None:
    for seed, count in enumerate(counts):
        optimizer.zero_grad()
        loss_of(model, tokens(count, seed)).backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module, atol: float = 1e-10) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=atol, rtol=0), name


@pytest.mark.parametrize("sides", ["both", "in", "out"])
@pytest.mark.parametrize("order", FIXED_ORDERS)
@pytest.mark.parametrize("count", COUNTS)
def test_every_order_gives_the_rotated_gradient(order: str, count: int, sides: str) -> None:
    dy, x, basis = torch.randn(count, OUT).double(), tokens(count), bases()["up"].only(sides)
    expected = basis.rotate(dy.T @ x)
    found = rotated_gradient(dy, x, basis.in_basis, basis.out_basis, FIXED_ORDERS[order])
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("count", "sides", "order"),
    [
        (0, "both", "tokens"),
        (767, "both", "tokens"),
        (768, "both", "inputs"),
        (3071, "both", "inputs"),
        (3072, "both", "gradient"),
        (3071, "in", "inputs"),
        (4096, "in", "gradient"),
        (767, "out", "outputs"),
        (768, "out", "gradient"),
    ],
)
def test_the_cheapest_order_has_the_fewest_multiplications(count: int, sides: str, order: str) -> None:
    n, m = 768, 3072
    assert cheapest_order(count, n, m, sides) == FIXED_ORDERS[order]

    def cost(inputs: bool, outputs: bool) -> int:
        rotations = (count if inputs else m) * n * n * (sides != "out")
        return rotations + (count if outputs else n) * m * m * (sides != "in")

    assert cost(*FIXED_ORDERS[order]) == min(cost(*one) for one in FIXED_ORDERS.values())


def test_the_cheapest_order_of_a_narrowing_linear_rotates_the_outputs_by_tokens() -> None:
    assert cheapest_order(1000, 3072, 768) == FIXED_ORDERS["outputs"]


@pytest.mark.parametrize("sides", ["both", "small"])
@pytest.mark.parametrize("order", [one for one in ORDERS if one != "gradient"])
def test_all_orders_walk_the_path_of_the_optimizer_that_rotates(order: str, sides: str) -> None:
    """Mixed token counts with padding, so that `auto` mixes the orders within one run."""
    reference, model = Network(), Network()
    train(reference, optimizer_for(reference, "gradient", sides=sides, weight_decay=0.1))
    train(model, optimizer_for(model, order, sides=sides, weight_decay=0.1))
    assert type(reference.up) is nn.Linear
    assert type(model.up) is LeanLinear
    assert_same(model, reference)
    assert not torch.equal(model.up.weight, Network().up.weight)


def test_the_gradient_of_a_shared_layer_is_the_sum_of_its_uses() -> None:
    """Three uses in one pass with different token counts, so with different orders."""
    reference, model = Network(3), Network(3)
    counts = (9, 13, 10)
    train(reference, optimizer_for(reference, "gradient"), counts)
    train(model, optimizer_for(model, "auto"), counts)
    assert_same(model, reference)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulation_and_clipping_by_norm_mean_the_same(clip: float | None) -> None:
    models = []
    for order in ("gradient", "auto"):
        model = Network()
        optimizer = optimizer_for(model, order)
        for step in range(3):
            optimizer.zero_grad()
            for micro, count in enumerate(COUNTS):
                loss_of(model, tokens(count, 10 * step + micro)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        models.append(model)
    assert_same(*models)


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("moments", ["dense", "support"])
def test_released_gradients_and_both_moments(release: bool, moments: str) -> None:
    reference, model = Network(), Network()
    train(reference, optimizer_for(reference, "gradient", moments=moments))
    optimizer = optimizer_for(model, "auto", moments=moments)
    if release:
        optimizer.release_gradients()
    train(model, optimizer)
    assert (model.up.weight.grad is None) == release
    assert_same(model, reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    reference, model = Network(), Network()
    optimizers = [optimizer_for(one, "auto") for one in (reference, model)]
    for seed, count in enumerate(COUNTS):
        x = tokens(count, seed).requires_grad_()
        for one, optimizer, saved in ((reference, optimizers[0], True), (model, optimizers[1], False)):
            optimizer.zero_grad()
            out = one(x) if saved else checkpoint(one, x, use_reentrant=reentrant)
            out.square().sum().backward()
            optimizer.step()
    assert_same(model, reference, 0)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_unscales_rotated_gradients(fused: bool | None) -> None:
    more = {"eps": 1.0, "fused": fused}  # with a small eps, Adam does not see the scale of its gradients
    reference, model = Network(dtype=torch.float32), Network(dtype=torch.float32)
    for one, scale in ((reference, 1.0), (model, 1024.0)):
        optimizer = optimizer_for(one, "auto", **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for seed in range(4):
            optimizer.zero_grad()
            scaler.scale(one(tokens(7, seed).float()).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same(model, reference, 1e-6)


@pytest.mark.parametrize("order", ["auto", "tokens", "inputs", "outputs"])
def test_bf16_autocast_and_bf16_weights_round_as_much_as_before(order: str) -> None:
    """Error of the rotated gradient against float64: at most 1.5 times that of rotating the plain gradient."""
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        errors = {}
        for name in ("gradient", order):
            model = Network(dtype=dtype)
            optimizer_for(model, name)
            twin = copy.deepcopy(to_linears(copy.deepcopy(model))).double()
            x = tokens(9).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(x).float().square().sum().backward()
            twin(x.double()).square().sum().backward()
            exact = bases()["up"].rotate(twin.up.weight.grad)
            assert model.up.weight.grad.dtype == dtype
            found = model.up.weight.grad.double()
            found = bases()["up"].rotate(found) if name == "gradient" else found
            errors[name] = float((found - exact).norm() / exact.norm())
        assert errors["gradient"] < 0.03
        assert errors[order] < 1.5 * errors["gradient"]


def test_the_model_and_its_files_stay_those_of_linears() -> None:
    model, plain = Network(), Network()
    called: list[int] = []
    model.up.register_forward_hook(lambda *_: called.append(1))
    layer = model.up
    optimizer = optimizer_for(model, "auto")
    assert model.up is layer
    assert torch.equal(model(tokens(5)), plain(tokens(5)))
    assert called == [1]
    assert model.state_dict().keys() == plain.state_dict().keys()
    train(model, optimizer)
    before = model(tokens(5))
    assert type(to_linears(model).up) is nn.Linear
    assert vars(model.up).keys() == vars(plain.up).keys()
    assert torch.equal(model(tokens(5)), before)
    plain.load_state_dict(model.state_dict())


def test_training_goes_on_after_to_linears_and_in_a_copy() -> None:
    reference, model = Network(), Network()
    train(reference, optimizer_for(reference, "gradient"))
    optimizer = optimizer_for(model, "auto")
    train(model, optimizer, COUNTS)
    model, optimizer = copy.deepcopy((model, optimizer))
    for seed, count in enumerate(COUNTS, start=len(COUNTS)):
        if seed == len(COUNTS) + 2:
            to_linears(model)
        optimizer.zero_grad()
        loss_of(model, tokens(count, seed)).backward()
        optimizer.step()
    assert_same(model, reference)


@pytest.mark.parametrize(("first", "second"), [("gradient", "auto"), ("auto", "gradient"), ("auto", "auto")])
def test_a_state_saved_in_the_other_gradient_space_continues(first: str, second: str) -> None:
    """Also with another basis: the layers rotate by the saved one from then on."""
    reference, model = Network(), Network()
    train(reference, optimizer_for(reference, "gradient"))
    optimizer = optimizer_for(model, first)
    train(model, optimizer, COUNTS)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = Network()
    resumed.load_state_dict(model.state_dict())
    others = {kind: Basis.identity(*basis.shape, torch.float64) for kind, basis in bases().items()}
    again = prepare(resumed, None, NAMES, lr=1e-2, keep=9, bases=others, rotation_order=second)
    again.load_state_dict(torch.load(file, weights_only=True))
    for seed, count in enumerate(COUNTS, start=len(COUNTS)):
        again.zero_grad()
        loss_of(resumed, tokens(count, seed)).backward()
        again.step()
    assert_same(resumed, reference)


def test_calibration_of_a_prepared_model_sees_plain_gradients() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.network(x).square().sum()}

    model, data = Loss(), [{"x": tokens(9)}]
    linears = {"up": [model.network.up], "down": [model.network.down]}
    expected = calibrate(model, data, linears, 1)
    optimizer_for(model.network, "auto")
    for kind, basis in calibrate(model, data, linears, 1).items():
        assert torch.allclose(basis.in_basis, expected[kind].in_basis)
    assert model.network.up.rotation is not None


def test_compiled_layers_rotate_too() -> None:
    torch.compiler.reset()
    reference, model = Network(), Network()
    optimizers = [optimizer_for(one, "auto") for one in (reference, model)]
    called = [reference, torch.compile(model, backend="aot_eager", fullgraph=True)]
    for one, optimizer in zip(called, optimizers, strict=True):
        train(one, optimizer, (5, 9, 40, 5))
    assert_same(model, reference)
