"""Moments on the kept entries alone, compact ones included, and steps that are refused."""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad import Basis, SparseGradAdamW, UserError, hosvd
from sparsegrad.optim.finite import all_finite

SHAPE = (12, 8)


def weights(count: int = 3, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def basis() -> Basis:
    return hosvd(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(parameter.dtype)


def walk(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        give_gradients(parameters, seed)
        optimizer.step()


@pytest.mark.parametrize("moments", ["dense", "support"])
@pytest.mark.parametrize("sides", ["both", "in", "out", None])
def test_weights_updated_together_are_updated_as_each_alone(moments: str, sides: str | None) -> None:
    one, other = weights(), weights()
    group = {"keep": 9, "moments": moments, "basis": None if sides is None else basis().only(sides)}
    walk(one, SparseGradAdamW([{"params": one, **group}], lr=1e-2), range(6))
    alone = [SparseGradAdamW([{"params": [weight], **group}], lr=1e-2) for weight in other]
    for seed in range(6):
        give_gradients(other, seed)
        for optimizer in alone:
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))


def test_a_weight_that_gets_no_gradient_for_a_while_has_its_own_step_count() -> None:
    one, other = weights(2), weights(2)
    together = SparseGradAdamW([{"params": one, "keep": 9}], lr=1e-2)
    alone = [SparseGradAdamW([{"params": [weight], "keep": 9}], lr=1e-2) for weight in other]
    for seed in range(6):
        for parameters, optimizers in ((one, [together]), (other, alone)):
            give_gradients(parameters, seed)
            if seed in (1, 2):
                parameters[0].grad = None
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))


def test_one_side_is_the_other_left_as_it_is() -> None:
    one, other, full = weights(1), weights(1), basis()
    half = Basis(full.in_basis, torch.eye(SHAPE[0], dtype=torch.float64))
    walk(one, SparseGradAdamW([{"params": one, "keep": 9, "basis": full.only("small")}], lr=1e-2), range(5))
    walk(other, SparseGradAdamW([{"params": other, "keep": 9, "basis": half}], lr=1e-2), range(5))
    assert torch.allclose(one[0], other[0], atol=1e-12)


def test_compact_moments_of_everything_are_adam() -> None:
    """With all entries kept none is ever dropped, and the age is the step count."""
    one, other = weights(1), weights(1)
    walk(one, SparseGradAdamW([{"params": one, "density": 1.0, "moments": "support"}], lr=1e-2), range(8))
    walk(other, torch.optim.AdamW(other, lr=1e-2, weight_decay=0), range(8))
    assert torch.allclose(one[0], other[0], atol=1e-12)


@pytest.mark.parametrize("keep", [3, 9, 20])
def test_compact_moments_follow_each_entry_as_long_as_it_has_a_slot(keep: int) -> None:
    """Against plain Adam for each entry, with its own count, forgotten when 4 x keep others were used later."""
    lr, parameters = 1e-2, weights(1)
    optimizer = SparseGradAdamW([{"params": parameters, "keep": keep, "moments": "support"}], lr=lr)
    expected, known = parameters[0].detach().flatten().clone(), {}
    for seed in range(200):  # long enough for every coincidence of known and new positions
        give_gradients(parameters, seed)
        gradient = parameters[0].grad.flatten()
        for position in gradient.abs().topk(keep).indices.tolist():
            m, v, age, _ = known.get(position, (0.0, 0.0, 0, 0))
            g, age = float(gradient[position]), age + 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            known[position] = (m, v, age, seed)
            expected[position] -= lr * (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)) ** 0.5 + 1e-8)
        optimizer.step()
        state = optimizer.state[parameters[0]]
        slots = state["index"][state["age"] > 0].tolist()
        held = set(slots)
        assert len(held) == len(slots), "an entry has two slots"
        assert held <= known.keys()
        assert len(held) == min(4 * keep, len(known))
        assert min(known[p][3] for p in held) >= max((known[p][3] for p in known.keys() - held), default=0)
        known = {position: known[position] for position in held}
    assert torch.allclose(parameters[0].flatten(), expected, atol=1e-12)


def test_compact_moments_are_small() -> None:
    weight = nn.Parameter(torch.randn(200, 100))
    sizes = {}
    for moments in ("dense", "support"):
        optimizer = SparseGradAdamW([{"params": [weight], "density": 0.01, "moments": moments}], lr=1e-2)
        weight.grad = torch.randn(200, 100)
        optimizer.step()
        state = optimizer.state[weight].values()
        sizes[moments] = sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert sizes["support"] <= 0.11 * sizes["dense"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compact_moments_are_saved_and_go_on_to_the_bit(dtype: torch.dtype) -> None:
    group = {"keep": 9, "moments": "support"}
    whole, halves = weights(dtype=dtype), weights(dtype=dtype)
    torch.manual_seed(1)
    walk(whole, SparseGradAdamW([{"params": whole, **group}], lr=1e-2), range(8))
    torch.manual_seed(2)  # the rounding of bfloat16 weights does not depend on torch's generator
    first = SparseGradAdamW([{"params": halves, **group}], lr=1e-2)
    walk(halves, first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SparseGradAdamW([{"params": halves, **group}], lr=1e-2)
    second.load_state_dict(torch.load(file, weights_only=True))
    walk(halves, second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_moments_of_the_other_kind_are_refused() -> None:
    parameters = weights(1)
    dense = SparseGradAdamW([{"params": parameters, "keep": 9}], lr=1e-2)
    compact = SparseGradAdamW([{"params": parameters, "keep": 9, "moments": "support"}], lr=1e-2)
    with pytest.raises(UserError, match="saved state has moments=dense, this optimizer moments=support: make it with"):
        compact.load_state_dict(dense.state_dict())
    with pytest.raises(UserError, match="moments=some is not allowed: choose one of dense, support"):
        SparseGradAdamW([{"params": parameters, "keep": 9, "moments": "some"}], lr=1e-2)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("moments", ["dense", "support"])
@pytest.mark.parametrize(
    ("place", "poison"), [(1, float("nan")), (1, float("inf")), (3, float("nan")), (3, -float("inf"))]
)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    moments: str, fused: bool, place: int, poison: float
) -> None:
    """Of a SparseGrad weight (1) or of a plain one (3)."""
    parameters, rest = weights(), nn.Parameter(torch.ones(4))
    groups = [{"params": parameters, "keep": 9, "moments": moments, "basis": basis()}, {"params": [rest]}]
    optimizer = SparseGradAdamW(groups, lr=1e-2, weight_decay=0.1, fused=fused)

    def step(seed: int, value: float | None = None) -> None:
        give_gradients(parameters, seed)
        rest.grad = torch.ones(4)
        if value is not None:
            [*parameters, rest][place].grad.view(-1)[2] = value
        optimizer.step()

    def everything() -> list[Tensor]:
        states = [optimizer.state[p] for p in parameters]
        return [*parameters, rest, *(one for state in states for one in state.values() if isinstance(one, Tensor))]

    step(0)
    before = copy.deepcopy(everything())
    step(1, poison)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(2)
    assert optimizer.skipped_steps == 1
    assert not any(torch.equal(a, b) for a, b in zip(before[:4], everything()[:4], strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_plain_groups_alone_skip_a_step_as_a_whole_and_else_are_adamw(fused: bool) -> None:
    """As with engine `fast`, whose cores are in plain groups."""
    one, other = ([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(5))] for _ in range(2))
    optimizer = SparseGradAdamW([{"params": [each]} for each in one], lr=0.1, fused=fused)
    reference = torch.optim.AdamW(other, lr=0.1, weight_decay=0.0, fused=fused)
    for seed, poison in enumerate([None, float("nan"), None]):
        generator = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(one, other, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        if poison is None:
            reference.step()
        else:
            one[1].grad[4] = poison
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf"), -float("inf")])
def test_gradients_of_all_forms_are_checked(poison: float | None) -> None:
    forms = [torch.ones(3, dtype=torch.bfloat16), torch.full((2, 2), 1e300, dtype=torch.float64), torch.empty(0, 3)]
    forms += [torch.ones(4, dtype=torch.complex64), torch.full((9,), 3e38), torch.ones(2).to_sparse()]
    assert all_finite(forms)
    for gradient in (forms[0], forms[1], forms[3].real, forms[3].imag, forms[4]):
        if poison is not None:
            kept, gradient.view(-1)[0] = gradient.view(-1)[0].clone(), poison
            assert not all_finite(forms)
            gradient.view(-1)[0] = kept
    assert all_finite([torch.empty(0)]) is all_finite([]) is None


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_to_maximize_is_to_minimize_the_negative_loss(moments: str) -> None:
    one, other = weights(1), weights(1)
    group = {"keep": 9, "basis": basis(), "moments": moments}
    up = SparseGradAdamW([{"params": one, **group, "maximize": True}], lr=1e-2, weight_decay=0.1)
    down = SparseGradAdamW([{"params": other, **group}], lr=1e-2, weight_decay=0.1)
    for seed in range(4):
        give_gradients(one, seed)
        other[0].grad = -one[0].grad
        up.step()
        down.step()
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_a_rate_of_zero_moves_nothing_and_a_tensor_is_as_good_as_a_number(moments: str) -> None:
    still, one, other = weights(1), weights(1), weights(1)
    group = {"keep": 9, "basis": basis(), "moments": moments}
    for parameters, rate in ((still, 0.0), (one, 0.5), (other, torch.tensor(0.5))):
        walk(parameters, SparseGradAdamW([{"params": parameters, **group}], lr=rate, weight_decay=0.5), range(3))
    assert torch.equal(still[0], weights(1)[0])
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("keep", [3, 9, 20])
def test_compact_moments_follow_a_change_of_the_density(keep: int) -> None:
    """The entries that were used last keep their moments; a step that is skipped shows them alone."""
    parameters = weights(2)
    optimizer = SparseGradAdamW([{"params": parameters, "keep": 9, "moments": "support"}], lr=1e-2)
    walk(parameters, optimizer, range(4))
    before = {name: value.clone() for name, value in optimizer.state[parameters[1]].items()}
    optimizer.param_groups[0]["keep"] = keep
    give_gradients(parameters, 4)
    parameters[0].grad[0, 0] = float("nan")
    optimizer.step()
    state, slots = optimizer.state[parameters[1]], min(4 * keep, 36)
    order = (before["used"].long() * -1000 + before["index"]).argsort()[:slots].sort().values
    for name in ("index", "used", "age", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][:slots], before[name][order]), name
    assert len(state["index"]) == min(4 * keep, 96)
    walk(parameters, optimizer, range(5, 8))
    assert optimizer.skipped_steps == 1


def test_the_slots_do_not_depend_on_how_a_device_orders_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    """`topk` of equal values: the first ones on one device, the last ones on another."""

    def last_ones(values: Tensor, count: int, **options: bool) -> Any:
        found = plain(values.flip(-1), count, **options)
        return type(found)((found.values, values.shape[-1] - 1 - found.indices))

    walked = []
    plain = Tensor.topk
    for topk in (plain, last_ones):
        monkeypatch.setattr(Tensor, "topk", topk)
        parameters = weights()
        group = {"params": parameters, "keep": 9, "moments": "support", "basis": basis()}
        walk(parameters, SparseGradAdamW([group], lr=1e-2), range(12))
        walked.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*walked, strict=True))


def storages(optimizer: SparseGradAdamW) -> dict[int, int]:
    """Address -> bytes of the memory that the moments hold."""
    held = [one.untyped_storage() for state in optimizer.state.values() for one in state.values() if one.numel() > 1]
    return {one.data_ptr(): one.nbytes() for one in held}


SETS: dict[str, Callable[[int], Sequence[int]]] = {
    "experts": lambda step: (0, 1, 2, 3, 4 + step % 12),
    "fewer and fewer": lambda step: range(16 - step % 16),
}


@pytest.mark.parametrize("used", SETS)
@pytest.mark.parametrize("moments", ["dense", "support"])
def test_weights_that_are_used_irregularly_take_the_steps_and_the_memory_of_each_alone(moments: str, used: str) -> None:
    one, other = weights(16), weights(16)
    group = {"keep": 9, "moments": moments}
    together = SparseGradAdamW([{"params": one, **group}], lr=1e-2)
    alone = [SparseGradAdamW([{"params": [weight], **group}], lr=1e-2) for weight in other]
    for seed in range(24):
        for parameters, optimizers in ((one, [together]), (other, alone)):
            give_gradients(parameters, seed)
            for number, parameter in enumerate(parameters):
                if number not in SETS[used](seed):
                    parameter.grad = None
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))
    needed = sum(one.nbytes for state in together.state.values() for one in state.values() if one.numel() > 1)
    assert sum(storages(together).values()) == needed


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_one_irregular_step_leaves_the_moments_rows_of_one_storage(moments: str) -> None:
    parameters = weights(8)
    optimizer = SparseGradAdamW([{"params": parameters, "keep": 9, "moments": moments}], lr=1e-2)
    walk(parameters, optimizer, range(2))
    count = len(storages(optimizer))
    give_gradients(parameters, 2)
    parameters[1].grad = None
    optimizer.step()
    walk(parameters, optimizer, range(3, 5))
    assert len(storages(optimizer)) == count


@pytest.mark.parametrize("moments", ["dense", "support"])
def test_loaded_moments_are_rows_of_one_storage(moments: str) -> None:
    parameters = weights()
    optimizer = SparseGradAdamW([{"params": parameters, "keep": 9, "moments": moments}], lr=1e-2)
    walk(parameters, optimizer, range(2))
    count = len(storages(optimizer))
    saved = optimizer.state_dict()
    apart = {number: {name: one.clone() for name, one in state.items()} for number, state in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": apart})
    assert len(storages(optimizer)) == count
    walk(parameters, optimizer, range(2, 3))
    assert len(storages(optimizer)) == count
