"""Models of a user's own: unusual linears, conversions, zero gradients, wrappers, and likely mistakes."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsegrad import Basis, UserError, calibrate, find_mlp, hosvd, prepare, save_bases, to_linears
from sparsegrad.adapter.merge import Patch, mark
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.optim.later import Later

NAMES = ["up", "down"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(input=x)))


class Net(nn.Module):
    """Two MLPs and a head; the loss is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Mlp() for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=(self.head(x).flatten() - labels).square().mean())


def batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": x, "labels": x[:, 0] * x[:, 1]} for x in torch.randn(count, 8, 8, generator=generator)]


def prepared(model: nn.Module, **options: Any) -> Any:
    return prepare(
        model, batches(), **{"target_modules": NAMES, "calibration_steps": 4, "lr": 1e-2, "density": 0.1, **options}
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> float:
    for batch in batches(count, seed=1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


def scale(model: Net) -> None:
    model.blocks[0].up = Scaled(8, 16)


def patch(model: Net) -> None:
    linear = model.blocks[0].up
    linear.forward = lambda input: 2 * nn.functional.linear(input, linear.weight, linear.bias)


@pytest.mark.parametrize("change", [scale, patch])
def test_a_linear_with_a_function_of_its_own_keeps_it_or_is_refused(change: Any) -> None:
    model = Net()
    change(model)
    with pytest.raises(UserError, match=r"blocks\.0\.up is a \w+ and has a forward of its own.*give engine=.exact."):
        prepared(model, engine="fast")
    before = model(**batches()[0]).loss
    optimizer = prepared(model)
    assert torch.equal(model(**batches()[0]).loss, before)
    weight = model.blocks[0].up.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model.blocks[0].up.weight, weight)


def test_a_linear_whose_tensors_accelerate_moves_is_accepted_by_fast() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Net()
    for block in model.blocks:
        hooks.add_hook_to_module(block.up, hooks.AlignDevicesHook("cpu"))
    train(model, prepared(model, engine="fast"))


def test_a_linear_with_another_parameter_is_refused_by_fast() -> None:
    model = Net()
    model.blocks[1].down.register_buffer("calls", torch.zeros(1))
    with pytest.raises(UserError, match=r"blocks\.1\.down is a Linear and has calls of its own"):
        prepared(model, engine="fast")


def test_the_core_stays_float32_when_the_model_is_converted() -> None:
    models = [Net(), Net().to(torch.bfloat16)]
    bases = prepared(Net(), engine="exact").bases
    optimizers = [prepare(model, None, NAMES, 0.3, 1e-2, bases=bases, engine="fast") for model in models]
    models[0].to(torch.bfloat16)
    for model, optimizer in zip(models, optimizers, strict=True):
        assert model.blocks[0].up.core.dtype == model.blocks[0].up.merged.dtype == torch.float32
        for batch in batches(3, seed=1):
            model(**{name: value.to(torch.bfloat16) for name, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_block_that_was_converted_to_float16_is_refused() -> None:
    model = Net()
    optimizer = prepared(model, engine="fast")
    model.half()
    batch = {name: value.half() for name, value in batches()[0].items()}
    model(**batch).loss.backward()
    with pytest.raises(
        UserError, match=r"the weight of a block is torch\.float16 now, in which small updates are lost"
    ):
        optimizer.step()


def test_a_trained_block_can_be_converted_to_float16_to_evaluate() -> None:
    model, x = Net(), batches()[0]["x"]
    train(model, prepared(model, engine="fast"))
    expected = outputs(copy.deepcopy(to_linears(copy.deepcopy(model))).half(), x.half())
    model.eval()
    model.half()
    assert torch.allclose(outputs(model, x.half()), expected, atol=1e-3)
    assert torch.equal(outputs(to_linears(model), x.half()), expected)


def test_pruning_after_prepare_is_refused_by_fast() -> None:
    model = Net()
    optimizer = prepared(model, engine="fast")
    for block in model.blocks:
        prune.l1_unstructured(block.up, "weight", amount=50)
    with pytest.raises(UserError, match="computed from other parameters, as by pruning"):
        train(model, optimizer)


def test_a_group_of_rotated_gradients_needs_its_density() -> None:
    model = Net()
    optimizer = prepared(model)
    for group in optimizer.param_groups:
        group["density"] = None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="a group with a basis has neither keep nor density"):
        train(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_density_for_biases_is_named() -> None:
    model = Net()
    optimizer = prepared(model)
    for group in optimizer.param_groups:
        group["density"] = 0.2
    with pytest.raises(UserError, match=r"bias cannot be SparseGrad.*such groups alone"):
        train(model, optimizer)


def test_gradients_that_are_all_zero_have_an_arbitrary_basis_and_a_warning() -> None:
    model = Net()
    for block in model.blocks:
        nn.init.zeros_(block.down.weight)
    with pytest.warns(UserWarning, match="all calibration gradients of a layer kind are zero.*basis is arbitrary"):
        prepared(model)
    nn.init.normal_(model.blocks[0].down.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(to_linears(model))


@pytest.mark.parametrize("method", ["gram", "stacked"])
def test_both_ways_of_hosvd_check_and_cast_alike(method: str) -> None:
    gradients = list(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))
    if method == "stacked":
        pytest.importorskip("tensorly")
    assert hosvd([one.bfloat16() for one in gradients], method=method).dtype == torch.float32
    for wrong, said in (
        ([*gradients, torch.full((6, 4), float("nan"))], "not finite"),
        ([*gradients, torch.randn(4, 6)], "shape|one kind per shape"),
    ):
        with pytest.raises(UserError, match=said):
            hosvd(wrong, method=method)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))}) for _ in range(2)
        )


def test_the_linears_of_a_sequential_are_kinds_of_their_own() -> None:
    found = find_mlp(Listed(), ["mlp.0", "mlp.2"])
    assert {kind: list(names) for kind, names in found.items()} == {
        f"layers.*.mlp.{number}": [f"layers.{layer}.mlp.{number}" for layer in range(2)] for number in (0, 2)
    }


def as_ddp(model: nn.Module) -> nn.Module:
    """As `DistributedDataParallel`, which needs a process group to be made."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, as_ddp])
def test_kinds_do_not_have_the_names_of_wrappers(wrap: Any) -> None:
    kinds = ["blocks.*.up", "blocks.*.down"]
    assert list(find_mlp(wrap(Net()), NAMES)) == kinds
    model = Net()
    model.blocks[0] = wrap(model.blocks[0])
    assert list(find_mlp(model, NAMES)) == kinds


def test_an_optimizer_in_the_backward_pass_does_not_step_during_calibration() -> None:
    model = Net()
    before, stepped = copy.deepcopy(model.state_dict()), []

    def step(parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
        stepped.append(parameter)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(functools.partial(step, optimizer=own))
    calibrate(model, batches(), find_mlp(model, NAMES), 4)
    assert not stepped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(**batches()[0]).loss.backward()
    assert len(stepped) == len(list(model.parameters()))


def outputs(model: Net, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return model.head(x).flatten()


@pytest.mark.parametrize("autocast", [False, True])
def test_batched_gradients_are_refused_and_the_remedy_works(autocast: bool) -> None:
    found = []
    for order in ("auto", "gradient"):
        model, x = Net(), batches()[0]["x"].requires_grad_()
        prepared(model, rotation_order=order)
        y = outputs(model, x)
        refused = pytest.raises(UserError, match=r"batched gradients .*rotation_order='gradient'")
        with refused if order == "auto" else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found += torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True)
    assert found[0].shape == (8, 8, 8)


def test_hooks_stay_when_a_calibration_fails() -> None:
    model, seen = Net(), []
    model.head.weight.register_post_accumulate_grad_hook(seen.append)
    linears = find_mlp(model, NAMES)
    model.blocks[0].up.weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        calibrate(model, batches(), linears, 4)
    model(**batches()[0]).loss.backward()
    assert len(seen) == 1


def test_linears_of_a_copy_are_mentioned() -> None:
    model = Net()
    with pytest.raises(UserError, match="the linears have to be those of this model, not of a copy"):
        calibrate(copy.deepcopy(model), batches(), find_mlp(model, NAMES), 4)


def test_a_model_can_be_copied_while_a_device_counts() -> None:
    model = Net()
    prepared(model)
    later = Later(torch.tensor(0))
    later._arrival = torch.Event()  # type: ignore[assignment]
    model.blocks[0].up.rotation._ties.append(later)
    copied = copy.deepcopy(model)
    assert copied.blocks[0].up.rotation._ties == []
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize("kind", [BlockLinear, SparseGradLinear])
def test_the_input_has_the_name_of_torchs_linear(kind: Any) -> None:
    options: dict[str, Any] = {"core_shape": (2, 2)} if kind is BlockLinear else {"keep": 3}
    layer, x = kind.from_linear(nn.Linear(8, 6), Basis.identity(6, 8), **options), torch.randn(3, 8)
    assert torch.equal(layer(input=x), layer(x))


def test_a_merge_in_inference_mode_leaves_parameters_that_can_train() -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    with torch.inference_mode():
        Patch(torch.ones(4), None, mark(weight)).swap(weight)
    assert weight.dtype == torch.float32
    (weight.requires_grad_(True).sum() * 2).backward()
    assert torch.equal(weight.grad, torch.full((2, 2), 2.0))


def test_an_earlier_optimizer_of_some_linears_is_named() -> None:
    model = Net()
    prepared(model)
    later = prepared(model, target_modules=["up"])
    with pytest.raises(
        UserError, match=r"rotates for the optimizer of another prepare: .* call sparsegrad\.to_linears"
    ):
        train(model, later)
    train(model, prepared(to_linears(model), target_modules=["up"]))


MISTAKES: dict[str, tuple[Any, str]] = {
    "one basis": (lambda path: save_bases(path, Basis.identity(2, 2)), "bases is .*Basis"),
    "numbered kinds": (lambda path: save_bases(path, {0: Basis.identity(2, 2)}), "bases is .*name of a layer kind"),
    "a list": (lambda _: Basis([[1.0]], None), "in_basis is a list: give a square matrix as a tensor"),
    "meta": (lambda _: prepared(Net().to("meta")), r"blocks\.0\.up\.weight has no values \(device meta\)"),
    "a parameter": (
        lambda _: prepared(Net(), train_rest=False, modules_to_save=["head.weight"]),
        "modules_to_save=head.weight is not allowed: modules train whole.*give 'head'",
    ),
    "a model's state": (
        lambda _: prepared(model := Net()).load_state_dict(model.state_dict()),
        "this is no state of an optimizer: give what optimizer.state_dict",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_likely_mistake_is_one_clear_error(mistake: str, tmp_path: Any) -> None:
    make, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        make(tmp_path / "bases.safetensors")
