"""Engine `exact`: one optimizer that walks the path of the paper's layer."""

import copy
import io

import pytest
import torch
from optim_cases import IN, OUT, groups, network, random_basis
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradAdamW, SparseGradLinear


def batches(steps: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, IN, generator=generator).double(), torch.randn(6, 3, generator=generator).double())
        for _ in range(steps)
    ]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, target in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backward", ["regular", "sparse_dense"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_both_engines_walk_the_same_path(backward: str, density: float) -> None:
    """The paper's layer with torch's own SparseAdam against engine `exact`: 20 steps, float64, 1e-8."""
    exact, layered, basis = network(), network(), random_basis()
    layered[0] = SparseGradLinear.from_linear(layered[0], basis, density=density, backward=backward)
    rest = [parameter for parameter in layered.parameters() if parameter is not layered[0].rotated_weight]
    reference = [
        torch.optim.SparseAdam([layered[0].rotated_weight], lr=1e-2),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0),
    ]
    optimizer = SparseGradAdamW(groups(exact, basis=basis, density=density), lr=1e-2)
    before = exact[0].weight.clone()
    assert train(exact, [optimizer], batches(20)) == pytest.approx(train(layered, reference, batches(20)), abs=1e-8)
    assert torch.allclose(exact[0].weight, layered[0].to_linear().weight, atol=1e-8, rtol=0)
    assert (exact[0].weight - before).abs().max() > 1e-3


def test_sparse_gradients_of_the_layer_are_taken_as_they_are() -> None:
    """`SparseGradAdamW` drives engine `layer` too, and equals SparseAdam."""
    one, other = (SparseGradLinear.from_linear(network()[0], random_basis(), keep=9) for _ in range(2))
    reference = torch.optim.SparseAdam([one.rotated_weight], lr=1e-2)
    optimizer = SparseGradAdamW([{"params": [other.rotated_weight], "keep": 9}], lr=1e-2)
    for x, _ in batches(10):
        for layer, driver in ((one, reference), (other, optimizer)):
            driver.zero_grad()
            layer(x).square().sum().backward()
            driver.step()
    assert torch.allclose(one.rotated_weight, other.rotated_weight, atol=1e-12)


def test_without_a_basis_it_is_meprop_with_masked_adam() -> None:
    """U = V = I equals no basis, and the entries outside the kept ones do not move."""
    one, other = network(), network()
    identity = Basis.identity(OUT, IN, torch.float64)
    first = SparseGradAdamW(groups(one, basis=identity, keep=7), lr=1e-2)
    second = SparseGradAdamW(groups(other, keep=7), lr=1e-2)
    before = one[0].weight.clone()
    train(one, [first], batches(1))
    train(other, [second], batches(1))
    assert torch.allclose(one[0].weight, other[0].weight, atol=1e-14)
    kept = one[0].weight.grad.abs().flatten().topk(7).indices
    moved = (other[0].weight != before).flatten().nonzero().flatten()
    assert set(moved.tolist()) == set(kept.tolist())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_everything_kept_without_rotation_is_adamw(weight_decay: float) -> None:
    """eps -> 0, since SparseAdam adds it before the bias correction and AdamW after."""
    one, other = network(), network()
    settings_ = {"lr": 1e-2, "eps": 1e-30, "weight_decay": weight_decay}
    optimizer = SparseGradAdamW(groups(one, basis=Basis.identity(OUT, IN, torch.float64), density=1.0), **settings_)
    losses = train(one, [optimizer], batches(20))
    assert losses == pytest.approx(train(other, [torch.optim.AdamW(other.parameters(), **settings_)], batches(20)))
    assert torch.allclose(one[0].weight, other[0].weight, atol=1e-12)


def test_groups_without_density_are_adamw_to_the_bit() -> None:
    one, other = network(), network()
    train(one, [SparseGradAdamW(one.parameters(), lr=1e-2, weight_decay=0.1)], batches(5))
    train(other, [torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)], batches(5))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_path_is_invariant_under_an_orthogonal_change_of_the_problem() -> None:
    """Training W with basis (U, V) is training Q W with basis (U, Q V) on outputs turned by Q."""
    Q = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64)).Q
    basis, weight = random_basis(), network()[0].weight.detach()
    one, other = nn.Parameter(weight.clone()), nn.Parameter(Q @ weight)
    turned = Basis(basis.in_basis, Q @ basis.out_basis)
    first = SparseGradAdamW([{"params": [one], "basis": basis, "keep": 9}], lr=1e-2)
    second = SparseGradAdamW([{"params": [other], "basis": turned, "keep": 9}], lr=1e-2)
    for x, _ in batches(15):
        (x @ one.T).sin().sum().backward()
        ((x @ other.T) @ Q).sin().sum().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(Q @ one, other, atol=1e-10)


def test_one_step_changes_keep_entries_of_the_rotated_weight() -> None:
    model, basis = network(), random_basis()
    before = basis.rotate(model[0].weight.detach())
    train(model, [SparseGradAdamW(groups(model, basis=basis, keep=10), lr=1e-2)], batches(1))
    assert ((basis.rotate(model[0].weight.detach()) - before).abs() > 1e-12).sum() == 10


def test_the_selection_is_made_after_accumulation() -> None:
    """Two micro-batches and one step equal one step on their sum."""
    one, other = network(), network()
    optimizers = [SparseGradAdamW(groups(model, basis=random_basis(), keep=9), lr=1e-2) for model in (one, other)]
    (x1, y1), (x2, y2) = batches(2)
    for x, y in ((x1, y1), (x2, y2)):
        (one(x) - y).square().sum().backward()
    ((other(torch.cat([x1, x2])) - torch.cat([y1, y2])).square().sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(one[0].weight, other[0].weight, atol=1e-12)


def test_training_one_weight_lowers_the_loss_to_the_full_methods_neighbourhood() -> None:
    """Of one weight alone: the rest could lower it without that weight."""
    losses = []
    for is_sparse in (True, False):
        model = network()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is model[0].weight)
        group = {"params": [model[0].weight], "basis": random_basis(), "density": 0.1}
        optimizer = SparseGradAdamW([group], lr=1e-2) if is_sparse else torch.optim.AdamW(group["params"], lr=1e-2)
        losses.append(train(model, [optimizer], batches(1) * 300))
    sparse, full = losses
    assert full[-1] < 0.3 * full[0]
    assert sparse[-1] < 1.5 * full[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    """Through a file read without pickle, into a fresh optimizer that has another basis."""
    data = [(x.to(dtype), y.to(dtype)) for x, y in batches(8)]
    model = network().to(dtype)
    optimizer = SparseGradAdamW(groups(model, basis=random_basis(), keep=9), lr=1e-2)
    train(model, [optimizer], data[:4])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    torch.manual_seed(1)
    train(model, [optimizer], data[4:])

    file.seek(0)
    saved, fresh = torch.load(file, weights_only=True), network(seed=5).to(dtype)
    resumed = SparseGradAdamW(groups(fresh, basis=random_basis(seed=9), keep=9), lr=1e-2)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.manual_seed(2)  # the rounding of bfloat16 weights does not depend on torch's generator
    train(fresh, [resumed], data[4:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_two_equal_runs_are_equal_to_the_bit() -> None:
    models = [network(), network()]
    for model in models:
        train(model, [SparseGradAdamW(groups(model, basis=random_basis(), density=0.1), lr=1e-2)], batches(10))
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_a_scheduler_drives_all_groups() -> None:
    model = network()
    optimizer = SparseGradAdamW(groups(model, basis=random_basis(), keep=9), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, [optimizer], batches(1))
    scheduler.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_without_gradient_stay_and_keep_no_state() -> None:
    model = network()
    optimizer = SparseGradAdamW(groups(model, basis=random_basis(), keep=9), lr=1e-2)
    optimizer.step()
    assert not optimizer.state


def test_a_closure_is_called_once_with_gradients() -> None:
    model, calls = network(), []
    optimizer = SparseGradAdamW(groups(model, basis=random_basis(), keep=9), lr=1e-2)

    def closure() -> Tensor:
        calls.append(1)
        loss = model(batches(1)[0][0]).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
@pytest.mark.parametrize(("out", "features"), [(1, 1), (1, 9), (9, 1), (2, 3), (4, 4), (5, 8), (9, 6), (9, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_shape_density_and_dtype(out: int, features: int, density: float, dtype: torch.dtype, seed: int) -> None:
    """A step lowers a convex loss, keeps the dtype, and changes at most the kept entries of the rotated weight."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(out, features).to(dtype))
    density = max(density, 1 / weight.numel())
    basis = random_basis(out, features, seed)
    optimizer = SparseGradAdamW([{"params": [weight], "basis": basis, "density": density}], lr=1e-2)
    before = weight.detach().clone()
    loss = weight.double().square().sum()
    loss.backward()
    optimizer.step()
    assert weight.dtype == dtype
    assert weight.double().square().sum() < loss
    if dtype == torch.float64:
        changed = (basis.rotate(weight.detach() - before).abs() > 1e-12).sum()
        assert changed <= round(density * weight.numel())
