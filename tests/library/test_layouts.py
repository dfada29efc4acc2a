"""`prepare` on toys of three layouts, and which weights it takes: named, listed, detected or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from layout_checks import check_conv1d, check_engine_layer, check_kept_entries, check_names
from torch import nn
from toy_models import SHAPES, TOYS, toy_batches, toy_model

from sparsegrad import SparseGradLinear, UserError, describe, find_mlp, prepare
from sparsegrad.targets import LAYOUTS

BERT = ("{}.encoder.layer.*.intermediate.dense", "{}.encoder.layer.*.output.dense")
LLAMA = tuple(f"model.layers.*.mlp.{kind}_proj" for kind in ("gate", "up", "down"))
T5 = ("encoder.block.*.layer.1.DenseReluDense.{}", "decoder.block.*.layer.2.DenseReluDense.{}")
# Layout -> names of its MLP linears in transformers; * is the number of the block.
NAMES: dict[str, tuple[str, ...]] = {
    **{name: tuple(part.format(name) for part in BERT) for name in ("bert", "roberta", "electra", "deberta", "mpnet")},
    "deberta-v2": tuple(part.format("deberta") for part in BERT),
    "distilbert": tuple(f"distilbert.transformer.layer.*.ffn.{kind}" for kind in ("lin1", "lin2")),
    "vit": tuple(f"vit.encoder.layers.*.mlp.{kind}" for kind in ("fc1", "fc2")),
    "gpt2": ("transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "t5": tuple(part.format(kind) for part in T5 for kind in ("wi", "wo")),
    "t5-gated": tuple(part.format(kind) for part in T5 for kind in ("wi_0", "wi_1", "wo")),
}


def skeleton(layout: str) -> nn.Module:
    """Linears under the MLP names of `layout`, two blocks of them, and nothing else."""
    model = nn.Module()
    for name in (pattern.replace("*", block) for pattern in NAMES[layout] for block in "01"):
        *parents, child = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(child, nn.Linear(2, 2))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_detected_by_its_names(layout: str) -> None:
    found = find_mlp(skeleton(layout))
    assert list(found) == list(LAYOUTS[layout])
    expected = {pattern.replace("*", block) for pattern in NAMES[layout] for block in "01"}
    assert {name for named in found.values() for name in named} == expected
    assert {kind: list(named) for kind, named in find_mlp(skeleton(layout), layout).items()} == {
        kind: list(named) for kind, named in found.items()
    }


@pytest.mark.parametrize("layout", TOYS)
def test_the_names_are_found_without_being_told(layout: str) -> None:
    check_names(toy_model(layout), layout, SHAPES[layout], 2)


@pytest.mark.parametrize("layout", TOYS)
def test_a_step_changes_the_kept_entries_and_nothing_that_is_frozen(layout: str) -> None:
    check_kept_entries(toy_model(layout), toy_batches(layout, 4))


@pytest.mark.parametrize("layout", [layout for layout in TOYS if layout != "gpt2"])  # GPT-2 has no linears
def test_engine_layer_walks_the_same_path(layout: str) -> None:
    check_engine_layer(toy_model(layout), toy_batches(layout, 4))


def test_conv1d_is_the_linear_with_its_basis_exchanged() -> None:
    check_conv1d(toy_model("gpt2"), toy_batches("gpt2", 5))


def test_conv1d_is_refused_by_engine_layer() -> None:
    conv = next(iter(find_mlp(toy_model("gpt2"))["c_fc"].values()))
    with pytest.raises(UserError, match="not Conv1D: use engine exact"):
        SparseGradLinear.from_linear(conv, None, keep=1)


def test_a_list_names_modules_by_their_ends_as_peft_does() -> None:
    model = toy_model("llama")
    found = find_mlp(model, ["up_proj", "model.layers.1.mlp.down_proj"])
    assert {kind: list(named) for kind, named in found.items()} == {
        "model.layers.*.mlp.up_proj": [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)],
        "model.layers.*.mlp.down_proj": ["model.layers.1.mlp.down_proj"],
    }


def test_describe_tells_what_was_taken() -> None:
    model = toy_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    plan = describe(
        prepare(model, toy_batches("llama", 2), target_modules=["up_proj"], density=0.1, calibration_steps=2)
    )
    (taken,) = plan.taken
    assert (taken.shape, taken.kept, len(taken.names)) == ((32, 16), 51, 2)
    assert taken.names[0] == "model.layers.0.mlp.up_proj.weight"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.rest == trainable - 2 * 512
    assert plan.trainable == plan.rest + 2 * 51
    assert "51 of 512" in str(plan)
    assert "9.961%" in str(plan)


def test_describe_refuses_other_optimizers() -> None:
    with pytest.raises(UserError, match="SGD has no SparseGrad weights"):
        describe(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_a_layout_that_some_blocks_lack_is_refused_and_both_remedies_work() -> None:
    """A mixture of experts with one dense block, whose other MLPs would train densely; a pruned block has nothing."""
    model = toy_model("llama")
    blocks = model.model.layers
    blocks.append(nn.Identity())
    assert len(find_mlp(model)["up"]) == 2
    blocks[1].mlp.shared, blocks[1].mlp.up_proj = nn.Module(), None
    blocks[1].mlp.shared.up_proj = nn.Linear(16, 8)
    expected = r'layout llama in 1 of 2 blocks of model\.layers, .*target_modules=\[\.\.\.\], or .*="llama" .*up_proj'
    with pytest.raises(UserError, match=expected):
        find_mlp(model)
    assert list(find_mlp(model, "llama")["up"]) == ["model.layers.0.mlp.up_proj"]
    assert list(find_mlp(model, ["up_proj"])) == ["model.layers.*.mlp.up_proj", "model.layers.*.mlp.shared.up_proj"]


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
    model = toy_model("bert")
    spoil(model)

    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    with pytest.raises(UserError, match=message):
        prepare(model, batches())


class TwoLayouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = toy_model("llama"), toy_model("gpt2")


@pytest.mark.parametrize(
    ("model", "target_modules", "message"),
    [
        (nn.Linear(2, 2), None, "Linear has the MLP names of no known layout .*bert.* target_modules="),
        (TwoLayouts(), None, "fits the layouts .*gpt2.*: choose one"),
        (nn.Linear(2, 2), [], "names no layer kind"),
        (nn.Linear(2, 2), [3], "names no layer kind"),
        (nn.Linear(2, 2), ["up_proj"], "no module named up_proj: the model has no linear"),
        (skeleton("t5-gated"), "t5", "no linear of kind wi, .*layout t5 .* its linears end in wi_0, wi_1, wo"),
        # Misspelt names: the closest that the model has, in the form that was given.
        (
            skeleton("bert"),
            ["intermediat.dense", "output.dense"],
            re.escape('did you mean target_modules=["intermediate.dense", "output.dense"]?'),
        ),
        (skeleton("llama"), ["up_prj"], re.escape('did you mean target_modules=["up_proj"]?')),
        (
            skeleton("bert"),
            ["intermediate"],
            r"a Module, not a linear .*: name only linears, such as .*intermediate\.dense",
        ),
        (skeleton("bert"), ["intermediat"], re.escape('did you mean target_modules=["intermediate.dense"]?')),
        (skeleton("llama"), ["wi"], "no module named wi: .* its linears end in gate_proj, up_proj, down_proj"),
        (skeleton("bert"), {"up": r".*intermediat\.dense"}, r"whole name .* such as \S+\.0\.intermediate\.dense"),
        (skeleton("bert"), {"up": ".*wi"}, r"no linear of kind up, .*\.\*wi.* its linears end in dense"),
        # A string is a layout; LoRA's users give names and expressions as one.
        (skeleton("bert"), "intermediate.dense", re.escape("not a layout (bert, ") + r'.*=\["intermediate\.dense"\]'),
        (skeleton("bert"), "intermediat.dense", r'not a layout .*=\["intermediate\.dense"\]'),
        (
            skeleton("bert"),
            r".*intermediate.*",
            r'expression is given .*target_modules=\{"mlp": "\.\*intermediate\.\*"\}',
        ),
        (skeleton("gpt2"), ["h.9.mlp.c_fc"], r'did you mean target_modules=\["h\.\d\.mlp\.c_fc"\]\?'),
        (skeleton("bert"), "all-linear", "all-linear exists in peft only: leave target_modules out"),
        (skeleton("bert"), "robertta", "target_modules=robertta is not allowed: .* did you mean roberta?"),
    ],
)
def test_names_that_find_nothing_are_refused_with_the_closest(
    model: nn.Module, target_modules: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_mlp(model, target_modules)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 3).long()}, "no loss for a batch of input_ids: give batches with labels"),
        ((torch.ones(2, 3).long(), torch.ones(2).long()), "a calibration batch is a tuple: give mappings"),
    ],
)
def test_batches_without_labels_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(toy_model("bert"), [batch], calibration_steps=1)


def test_a_loss_that_cannot_be_differentiated_is_refused() -> None:
    model = toy_model("bert")
    forward = model.forward
    model.forward = lambda **batch: {"loss": forward(**batch).loss.detach()}
    with pytest.raises(UserError, match="cannot be differentiated"):
        prepare(model, toy_batches("bert", 1), calibration_steps=1)
