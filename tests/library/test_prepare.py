"""Calibration and the two-line entry, on a small BERT."""

import pytest
import torch
from engine_checks import unfolded_svd
from torch import Tensor, nn
from toy_bert import ToyBert
from toy_models import toy_batches

from sparsegrad import SparseGradAdamW, UserError, calibrate, find_mlp, hosvd, prepare
from sparsegrad.calibration.gradients import check_counts


@pytest.fixture
def model(small_bert: ToyBert) -> ToyBert:
    """In float64: gradients are compared to the last digits."""
    return small_bert.double()


def batches(count: int) -> list[dict[str, Tensor]]:
    return toy_batches("bert", count)


def linears(model: torch.nn.Module) -> dict[str, list[torch.nn.Linear]]:
    return {kind: list(found.values()) for kind, found in find_mlp(model).items()}


@pytest.mark.parametrize("by", ["torch", "tensorly"])
def test_calibration_is_the_hosvd_of_the_stacked_gradients(model, by: str) -> None:
    """Gradients taken one by one with autograd, stacked, and decomposed whole."""
    if by == "tensorly":
        pytest.importorskip("tensorly")
    mlp, stacks = linears(model), {"intermediate": [], "output": []}
    for batch in batches(3):
        for kind, modules in mlp.items():
            stacks[kind] += torch.autograd.grad(model(**batch).loss, [linear.weight for linear in modules])
    for kind, basis in calibrate(model, batches(3), mlp, steps=3).items():
        reference = hosvd(stacks[kind], method="stacked") if by == "tensorly" else unfolded_svd(stacks[kind])
        for mine, theirs in ((basis.in_basis, reference.in_basis), (basis.out_basis, reference.out_basis)):
            # The leading directions; the trailing ones hold next to no energy, where a Gram sees nothing.
            assert torch.allclose((mine.T @ theirs).abs().diagonal()[:4], torch.ones(4).double(), atol=1e-6)


class Skipping(nn.Module):
    """Blocks, the second of which is used by every other batch only, as with LayerDrop or experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()

    def forward(self, x: Tensor, skips: bool) -> dict[str, Tensor]:
        y = self.blocks[0](x)
        return {"loss": (y if skips else self.blocks[1](y)).square().mean()}


def test_a_weight_that_some_batches_skip_counts_less_and_is_named_once() -> None:
    model, generator = Skipping(), torch.Generator().manual_seed(0)
    x = [torch.randn(5, 4, generator=generator).double() for _ in range(4)]
    data = [{"x": one, "skips": bool(number % 2)} for number, one in enumerate(x)]
    stack = []
    for batch in data:
        gradients = torch.autograd.grad(
            model(**batch)["loss"], [one.weight for one in model.blocks[:2]], allow_unused=True
        )
        stack += [gradient for gradient in gradients if gradient is not None]
    reference = unfolded_svd(stack)
    with pytest.warns(UserWarning, match="LayerDrop") as warned:
        found = calibrate(model, data, {"all": model.blocks[:2]}, steps=4)["all"]
    assert [str(one.message).split(":")[0] for one in warned] == [
        "calibration got fewer gradients than batches (4) of 1 of 2 weights, the fewest (2) of blocks.1.weight"
    ]
    for mine, theirs in zip((found.in_basis, found.out_basis), (reference.in_basis, reference.out_basis), strict=True):
        assert torch.allclose((mine.T @ theirs).abs(), torch.eye(4).double(), atol=1e-6)
    with pytest.raises(UserError, match=r"no gradient of blocks\.2\.weight from 4 batches: name only linears that"):
        calibrate(model, data, {"all": model.blocks}, steps=4)


class _Repeating(nn.Module):
    """A block that is applied twice, under reentrant checkpointing: its gradients come in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True)
        return {"loss": x.square().mean()}


def test_parts_of_gradients_are_not_taken_for_gradients() -> None:
    model, data = _Repeating(), [{"x": torch.randn(5, 4, requires_grad=True)} for _ in range(4)]
    with pytest.raises(UserError, match=r"8 gradients of block\.weight from 4 batches.*use_reentrant=False"):
        calibrate(model, data, {"all": [model.block]}, steps=4)


class _Checkpointing(nn.Module):
    """A block under reentrant checkpointing, whose input needs a gradient in training only."""

    def __init__(self, reentrant: bool, outside: bool) -> None:
        super().__init__()
        self.embed, self.block, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.reentrant, self.outside = reentrant, outside

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.utils.checkpoint.checkpoint(self.block, self.embed(x), use_reentrant=self.reentrant)
        return {"loss": (self.last(x) if self.outside else x).square().mean()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("outside", "message"), [(False, "cannot be differentiated"), (True, "no gradient of block")])
def test_a_reentrant_checkpoint_after_frozen_layers_is_named(outside: bool, message: str) -> None:
    model, data = _Checkpointing(True, outside), [{"x": torch.randn(5, 4)}]
    linears = {"all": [model.block, *([model.last] if outside else [])]}
    with pytest.raises(UserError, match=f"{message}.*use_reentrant=False"):
        calibrate(model, data, linears, steps=1)
    model.reentrant = False
    calibrate(model, data, linears, steps=1)


def test_several_processes_need_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would otherwise average those of different batches."""
    monkeypatch.setattr("sparsegrad.calibration.gradients.connected", lambda: True)
    check_counts({"a": 2, "b": 2}, 2)
    with pytest.raises(UserError, match=r"fewest \(1\) of b, but several processes need all: calibrate in one"):
        check_counts({"a": 2, "b": 1}, 2)


def test_calibration_leaves_the_model_as_it_was(model) -> None:
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    calibrate(model, batches(2), linears(model), steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(linear.weight.grad is None for kind in linears(model).values() for linear in kind)


def test_calibration_back_propagates_to_the_mlp_weights_alone_and_keeps_no_gradient(model) -> None:
    touched: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: touched.append(name))
    update_free = calibrate(model, batches(1), linears(model), steps=1)
    alive = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    expected = {f"{name}.weight" for found in find_mlp(model).values() for name in found}
    assert set(touched) == expected
    assert alive == []
    assert set(update_free) == {"intermediate", "output"}


def test_calibration_with_an_update_trains_meanwhile(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.classifier.weight.clone()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    calibrate(model, batches(2), linears(model), steps=2, update=update)
    assert not torch.equal(before, model.classifier.weight)


def test_two_lines_train_any_loop(model) -> None:
    optimizer = prepare(model, batches(5), density=0.05, lr=3e-3, calibration_steps=5)
    assert isinstance(optimizer, SparseGradAdamW)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    first = last = None
    for _ in range(30):
        loss = model(**batches(1)[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.5 * first
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]) or not weight.grad.any(), name


def test_prepare_covers_every_trainable_parameter_once(model) -> None:
    model.bert.embeddings.requires_grad_(False)
    optimizer = prepare(model, batches(2), keep=5, calibration_steps=2)
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert [group["keep"] for group in optimizer.param_groups] == [5, 5, None]


def test_patterns_name_linears_of_any_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    assert list(find_mlp(model, {"up": "0", "down": "2"})["down"]) == ["2"]


def test_attention_output_is_no_mlp(model) -> None:
    names = [name for found in find_mlp(model).values() for name in found]
    assert len(names) == 4
    assert not any("attention" in name for name in names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: prepare(torch.nn.Linear(2, 2), batches(1)), "no known layout .*bert"),
        (lambda model: prepare(model, batches(30), target_modules="gpt9"), "target_modules=gpt9 .* bert"),
        (lambda model: prepare(model, batches(30), target_modules={"up": ".*nothing"}), "has no linear of kind up"),
        (lambda model: prepare(model, batches(30), target_modules={"up": "("}), "not a regular expression"),
        (
            lambda model: prepare(model, batches(30), target_modules={"mixed": r".*layer\.\d\.(\w+)\.dense"}),
            "one kind per shape",
        ),
        # The remedy names the argument of the function that was called.
        (lambda model: prepare(model, batches(3)), "ran out of batches at 3 of 30: .* set calibration_steps=3"),
        (lambda model: prepare(model, iter(())), "batches is empty, .* calibration_steps=30: give a list"),
        (lambda model: prepare(model, batches(3), calibration_steps=0), "^calibration_steps=0 is not allowed"),
        (lambda model: calibrate(model, batches(3), linears(model)), "ran out of batches at 3 of 30: .* set steps=3"),
        (lambda model: calibrate(model, [], linears(model)), "batches is empty, .* steps=30: give a list"),
        (lambda model: calibrate(model, [], linears(model), 0), "^steps=0 is not allowed"),
        (lambda model: prepare(model, batches(3), densty=0.1), "prepare has no argument densty: did you mean density?"),
        (lambda model: prepare(model, batches(3), wd=0.1), "no argument wd: choose from model, .*, weight_decay"),
        (lambda model: prepare(model, batches(3), weight_dcay=0.1), "did you mean weight_decay?"),
        (lambda model: prepare(model, batches(3), density=2.0), "density=2.0"),
        (lambda model: prepare(model, batches(3), keep=513), "keep=513 .* to 512"),
        (lambda model: prepare(model, batches(3), lr=-1.0), "lr=-1.0"),
        (lambda model: prepare(batches(3), model), "model is a list, not a torch.nn.Module"),
        (lambda model: prepare(model, batches(1)[0]), "batches is one batch: give several"),
        (
            lambda model: prepare(model, [{"labels": [1, 0]}], calibration_steps=1),
            "batch of labels holds no tensor: .*return_tensors",
        ),
        (lambda model: prepare(model, [{"input_ids": torch.zeros(1, 3).long()}], calibration_steps=1), "no loss"),
    ],
)
def test_bad_input_is_named(model, call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_failed_calibration_leaves_no_hook_and_no_flag(model) -> None:
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError):
        calibrate(model, batches(1), linears(model), steps=2)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    model(**batches(1)[0]).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "layer" in name)
