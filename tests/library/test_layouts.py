"""`prepare` on every layout it knows: the right weights, and in each exactly the kept entries of the rotated space."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_zoo import ZOO, tiny_batches, tiny_model
from torch import Tensor, nn

from sparsegrad import SparseGradAdamW, SparseGradLinear, UserError, calibrate, describe, find_mlp, prepare
from sparsegrad.optim.groups import param_groups
from sparsegrad.targets import LAYOUTS

WIDE, NARROW = (32, 16), (16, 32)
BERT = {"intermediate": WIDE, "output": NARROW}
LLAMA = {"gate": WIDE, "up": WIDE, "down": NARROW}
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet"), BERT),
    "distilbert": {"lin1": WIDE, "lin2": NARROW},
    "vit": {"fc1": WIDE, "fc2": NARROW},
    "gpt2": {"c_fc": NARROW, "c_proj": WIDE},  # Conv1D: (in, out)
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "t5": {"wi": WIDE, "wo": NARROW},
    "t5-gated": {"wi_0": WIDE, "wi_1": WIDE, "wo": NARROW},
}


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def as_linears(model: nn.Module) -> nn.Module:
    """The same function with `nn.Linear` where GPT-2 has `Conv1D`."""
    for found in find_mlp(model).values():
        for name, conv in found.items():
            linear = nn.Linear(*conv.weight.shape, dtype=conv.weight.dtype)
            linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.clone()), conv.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def test_the_zoo_holds_every_layout() -> None:
    assert set(ZOO) == set(LAYOUTS) == set(SHAPES)


@pytest.mark.parametrize("layout", ZOO)
def test_the_names_are_found_without_being_told(layout: str) -> None:
    model = tiny_model(layout)
    if layout == "vit" and not any(name.endswith("fc1") for name, _ in model.named_modules()):
        layout = "bert"  # transformers 5.3 gives ViT the names of BERT, 5.23 its own
    detected, named = find_mlp(model), find_mlp(model, layout)
    assert {kind: list(found) for kind, found in detected.items()} == {kind: list(named[kind]) for kind in named}
    for kind, shape in SHAPES[layout].items():
        assert len(detected[kind]) == (4 if layout.startswith("t5") else 2)  # T5 has an encoder and a decoder
        assert {tuple(linear.weight.shape) for linear in detected[kind].values()} == {shape}
    assert set(detected) == set(SHAPES[layout])


@pytest.mark.parametrize("layout", ZOO)
def test_a_step_changes_the_kept_entries_and_nothing_that_is_frozen(layout: str) -> None:
    """Seen from outside: the change of a weight, rotated by its basis, has `keep` entries; after two steps up to 2x."""
    keep, model = 7, tiny_model(layout)
    model.requires_grad_(False)
    for found in find_mlp(model).values():
        for linear in found.values():
            linear.weight.requires_grad_(True)
    batches, before = tiny_batches(layout, 4), weights(model)
    optimizer = prepare(model, batches, keep=keep, lr=0.01, steps=2)
    mlp = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    for steps in (1, 2):
        step(model, optimizer, batches[steps])
        for name, now in weights(model).items():
            change = now - before[name]
            if name not in mlp:
                assert not change.any(), name
                continue
            kept = int((mlp[name]["basis"].rotate(change).abs() > 1e-9).sum())
            assert keep <= kept <= steps * keep


@pytest.mark.parametrize("layout", [layout for layout in ZOO if layout != "gpt2"])  # GPT-2 has no linears
def test_engine_layer_walks_the_same_path(layout: str) -> None:
    merged, batches = tiny_model(layout), tiny_batches(layout, 4)
    layer = copy.deepcopy(merged)
    linears = find_mlp(merged)
    bases = calibrate(merged, batches, {kind: found.values() for kind, found in linears.items()}, steps=2)
    optimizer = SparseGradAdamW(param_groups(merged, linears, bases, keep=9), lr=1e-2)
    rotated = []
    for kind, found in find_mlp(layer).items():
        for name, linear in found.items():
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, SparseGradLinear.from_linear(linear, bases[kind], keep=9))
            rotated.append(layer.get_submodule(name).rotated_weight)
    own = {id(weight) for weight in rotated}
    rest = [parameter for parameter in layer.parameters() if id(parameter) not in own]
    other = SparseGradAdamW([{"params": rotated, "keep": 9}, {"params": rest}], lr=1e-2)
    for batch in batches[:3]:
        step(merged, optimizer, batch)
        step(layer, other, batch)
    for found in linears.values():
        for name, linear in found.items():
            assert torch.allclose(linear.weight, layer.get_submodule(name).to_linear().weight, atol=1e-9)


def test_conv1d_is_the_linear_with_its_basis_exchanged() -> None:
    """GPT-2 as it is, and with linears in place of Conv1D: one path, whose bases are each other's mirror."""
    conv, batches = tiny_model("gpt2"), tiny_batches("gpt2", 5)
    linear = as_linears(copy.deepcopy(conv))
    optimizers = [prepare(model, batches, keep=11, lr=1e-2, steps=4) for model in (conv, linear)]
    mine, theirs = (optimizer.param_groups[0]["basis"] for optimizer in optimizers)
    leading = slice(0, 6)  # trailing directions hold no energy, and are arbitrary
    assert torch.allclose(
        (mine.out_basis.T @ theirs.in_basis).abs().diagonal()[leading], torch.ones(6).double(), atol=1e-6
    )
    for batch in batches:
        step(conv, optimizers[0], batch)
        step(linear, optimizers[1], batch)
    for found in find_mlp(conv).values():
        for name, module in found.items():
            assert torch.allclose(module.weight.T, linear.get_submodule(name).weight, atol=1e-9)


def test_conv1d_is_refused_by_engine_layer() -> None:
    conv = next(iter(find_mlp(tiny_model("gpt2"))["c_fc"].values()))
    with pytest.raises(UserError, match="not Conv1D: use engine exact"):
        SparseGradLinear.from_linear(conv, None, keep=1)


def test_a_list_names_modules_by_their_ends_as_peft_does() -> None:
    model = tiny_model("llama")
    found = find_mlp(model, ["up_proj", "model.layers.1.mlp.down_proj"])
    assert {kind: list(named) for kind, named in found.items()} == {
        "model.layers.*.mlp.up_proj": [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)],
        "model.layers.*.mlp.down_proj": ["model.layers.1.mlp.down_proj"],
    }


def test_describe_tells_what_was_taken() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    plan = describe(prepare(model, tiny_batches("llama", 2), mlp=["up_proj"], density=0.1, steps=2))
    (taken,) = plan.taken
    assert (taken.shape, taken.kept, len(taken.names)) == (WIDE, 51, 2)
    assert taken.names[0] == "model.layers.0.mlp.up_proj.weight"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.rest == trainable - 2 * 512
    assert plan.trainable == plan.rest + 2 * 51
    assert "51 of 512" in str(plan)
    assert "9.961%" in str(plan)


def test_describe_refuses_other_optimizers() -> None:
    with pytest.raises(UserError, match="SGD has no SparseGrad weights"):
        describe(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def frozen(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)


def tied(model: Any) -> None:
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight


def quantized(model: Any) -> None:
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.weight = nn.Parameter(torch.zeros(256, 1, dtype=torch.uint8), requires_grad=False)


def quantized_class(model: Any) -> None:
    model.bert.encoder.layer[0].intermediate.dense.weight.quant_state = object()


def wrapped(model: Any) -> None:
    model.bert.encoder.layer[0].intermediate.dense = nn.Sequential(nn.Linear(16, 32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (frozen, r"layer\.1\.output\.dense\.weight is frozen .* requires_grad_\(True\)"),
        (tied, r"tied under the names bert.*layer\.0.*, bert.*layer\.1"),
        (quantized, r"layer\.0\.intermediate\.dense\.weight is quantized \(Parameter, torch\.uint8\)"),
        (quantized_class, r"is quantized"),
        (wrapped, r"layer\.0\.intermediate\.dense is a Sequential, not a linear"),
    ],
)
def test_weights_that_cannot_train_are_refused_before_any_batch(spoil: Any, message: str) -> None:
    model = tiny_model("bert")
    spoil(model)

    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    with pytest.raises(UserError, match=message):
        prepare(model, batches())


class TwoLayouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = tiny_model("llama"), tiny_model("gpt2")


@pytest.mark.parametrize(
    ("model", "mlp", "message"),
    [
        (nn.Linear(2, 2), None, "Linear has the MLP names of no known layout .*bert.* target_modules="),
        (TwoLayouts(), None, "fits the layouts .*gpt2.*: choose one"),
        (nn.Linear(2, 2), [], "names no layer kind"),
        (nn.Linear(2, 2), [3], "names no layer kind"),
        (nn.Linear(2, 2), ["up_proj"], "no MLP linear of kind up_proj"),
        (tiny_model("t5-gated"), "t5", "no MLP linear of kind wi:"),
    ],
)
def test_unclear_names_are_refused(model: nn.Module, mlp: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_mlp(model, mlp)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 3).long()}, "no loss for a batch of input_ids: give batches with labels"),
        ((torch.ones(2, 3).long(), torch.ones(2).long()), "a calibration batch is a tuple: give mappings"),
    ],
)
def test_batches_without_labels_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tiny_model("bert"), [batch], steps=1)


def test_a_loss_that_cannot_be_differentiated_is_refused() -> None:
    with torch.no_grad(), pytest.raises(UserError, match="cannot be differentiated"):
        prepare(tiny_model("bert"), tiny_batches("bert", 1), steps=1)
