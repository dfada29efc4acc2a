"""Every layout on the architectures of transformers: their names, and the method on them."""

from __future__ import annotations

import pytest
from layout_checks import check_conv1d, check_engine_layer, check_kept_entries, check_names

from sparsegrad import UserError, find_mlp, prepare
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.targets import LAYOUTS

pytest.importorskip("transformers")

from model_zoo import ZOO, tiny_batches, tiny_model

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


def test_the_zoo_holds_every_layout() -> None:
    assert set(ZOO) == set(LAYOUTS) == set(SHAPES)


@pytest.mark.parametrize("layout", ZOO)
def test_the_names_are_found_without_being_told(layout: str) -> None:
    model = tiny_model(layout)
    if layout == "vit" and not any(name.endswith("fc1") for name, _ in model.named_modules()):
        layout = "bert"  # transformers 5.3 gives ViT the names of BERT, 5.23 its own
    check_names(model, layout, SHAPES[layout], 4 if layout.startswith("t5") else 2)  # T5: encoder and decoder


@pytest.mark.parametrize("layout", ZOO)
def test_a_step_changes_the_kept_entries_and_nothing_that_is_frozen(layout: str) -> None:
    check_kept_entries(tiny_model(layout), tiny_batches(layout, 4))


@pytest.mark.parametrize("layout", [layout for layout in ZOO if layout != "gpt2"])  # GPT-2 has no linears
def test_engine_layer_walks_the_same_path(layout: str) -> None:
    check_engine_layer(tiny_model(layout), tiny_batches(layout, 4))


def test_conv1d_is_the_linear_with_its_basis_exchanged() -> None:
    check_conv1d(tiny_model("gpt2"), tiny_batches("gpt2", 5))


def test_conv1d_is_refused_by_the_engines_that_replace_linears() -> None:
    conv = next(iter(find_mlp(tiny_model("gpt2"))["c_fc"].values()))
    with pytest.raises(UserError, match="not Conv1D: use engine exact"):
        SparseGradLinear.from_linear(conv, None, keep=1)
    with pytest.raises(UserError, match=r'^engine="fast" wraps nn\.Linear, not Conv1D: give engine="exact"$'):
        prepare(tiny_model("gpt2"), tiny_batches("gpt2", 1), engine="fast")
