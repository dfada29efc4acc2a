"""The plan of a fine-tuning's memory: what it counts, and what it advises when there is too little."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from model_zoo import tiny_model
from peft_cases import needs_lora_ga
from run_fixtures import Tiny
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

from sparsegrad.errors import UserError
from sparsegrad.runs.memory_estimate import GIB, Setup, check_fits, estimate_memory, make_setup
from sparsegrad.targets import find_mlp

SEVEN_B = Setup(
    method="sparsegrad", parameters=6_738_415_616, selected=22 * 4096 * 11008,
    shapes={"up": (11008, 4096), "down": (4096, 11008)}, linears=22, width=4096, mlp_width=11008, depth=32,
    vocabulary=32000, tokens=1024, precision="bf16_weights", checkpointing=True, bases=True,
)  # fmt: skip


def test_the_plan_counts_weights_gradients_and_moments() -> None:
    need, full = estimate_memory(SEVEN_B), estimate_memory(replace(SEVEN_B, method="full", bases=False))
    assert need["weights"] == 2 * SEVEN_B.parameters + 2 * SEVEN_B.selected
    assert (need["gradients"], need["optimizer"]) == (4 * SEVEN_B.selected, 8 * SEVEN_B.selected)
    assert (full["bases"], need["bases"]) == (0, 2 * 2 * 4 * (4096**2 + 11008**2))
    assert estimate_memory(replace(SEVEN_B, method="lora", added=9, bases=False))["optimizer"] == 8 * 9
    # Before the training, a method that collects holds each gradient and the mean; of which the moments take the place.
    collected = replace(SEVEN_B, method="lora_sb", added=9, collects=True, bases=False)
    assert estimate_memory(collected)["bases"] == 8 * SEVEN_B.selected - 12 * 9
    assert estimate_memory(replace(SEVEN_B, method="static_mask", collects=True, bases=False))["bases"] == 0


def test_the_papers_model_fits_80_gb_and_not_24() -> None:
    check_fits(SEVEN_B, 80 * GIB)
    with pytest.raises(UserError, match=r"needs about .* GiB and the device has 24\.0: this would fit: .*lora"):
        check_fits(SEVEN_B, 24 * GIB)
    with pytest.raises(UserError, match="no setting of this model fits"):
        check_fits(SEVEN_B, 4 * GIB)


def test_the_remedy_fits() -> None:
    large = replace(SEVEN_B, precision="fp32", checkpointing=False, tokens=16384)
    with pytest.raises(UserError, match=r"this would fit: train\.gradient_checkpointing=true"):
        check_fits(large, 60 * GIB)
    check_fits(replace(large, checkpointing=True), 60 * GIB)


@pytest.mark.parametrize(("layout", "mlp_width"), [("gpt2", 32), ("llama", 32), ("qwen2", 32)])
@pytest.mark.parametrize("kinds", [1, 3])
def test_the_mlp_width_is_that_of_the_linears(layout: str, mlp_width: int, kinds: int) -> None:
    """GPT-2's configuration has no intermediate_size, and its weights are (in, out)."""
    model = tiny_model(layout)
    train = SimpleNamespace(batch_size=4, precision="fp32", gradient_checkpointing=False, train_rest=False)
    config = SimpleNamespace(
        method=SimpleNamespace(name="full"),
        train=train,
        data=SimpleNamespace(max_length=9),
        task=SimpleNamespace(is_language=True),
    )
    linears = dict(list(find_mlp(model).items())[:kinds])
    setup = make_setup(config, model, linears)  # type: ignore[arg-type]
    assert (setup.width, setup.mlp_width, setup.depth, setup.vocabulary, setup.tokens) == (16, mlp_width, 2, 50, 36)


def test_a_model_that_reads_images_too_is_measured_by_its_part_for_text() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    model = AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    config = SimpleNamespace(
        method=SimpleNamespace(name="full"),
        train=SimpleNamespace(batch_size=4, precision="fp32", gradient_checkpointing=False, train_rest=False),
        data=SimpleNamespace(max_length=9),
        task=SimpleNamespace(is_language=True),
    )
    setup = make_setup(config, model, find_mlp(model, "llama"))  # type: ignore[arg-type]
    assert (setup.width, setup.mlp_width, setup.depth, setup.vocabulary) == (16, 32, 2, 50)


ADDED = {  # one block: a weight (64, 32) and a weight (32, 64)
    "lora": (2 * 2 * 96, False),
    "lora_xs": (2 * 5**2, False),  # 5^2 is closest to 1 % of 2048
    "lora_sb": (2 * 5**2, True),
    "peft/ia3": (2 * 64, False),
    "peft/lora_ga": (2 * 96, True),
    "peft/vera": (32 + 64 + 2 * 256, False),
    "bitfit": (0, False),
    "frozen": (0, False),
    "sparsegrad_fast": (2 * 6 * 3, False),
    "static_mask": (None, True),
    "random_mask": (None, False),
    "full": (None, False),
}


@pytest.mark.parametrize("name", [pytest.param(one, marks=needs_lora_ga if "lora_ga" in one else ()) for one in ADDED])
def test_each_method_counts_what_it_trains(tiny: Tiny, small_bert: Any, name: str) -> None:
    """As in the counts of the trained model."""
    config = tiny(f"method={name}", "method.budget=density:0.05" if name == "peft/lora_ga" else "train.lr=1e-3")
    linears = {kind: {kind: nn.Linear(*sizes)} for kind, sizes in (("intermediate", (32, 64)), ("output", (64, 32)))}
    setup = make_setup(config, small_bert, linears)
    assert (setup.added, setup.collects) == ADDED[name]
    assert (setup.rest == 0) is (name in ("bitfit", "frozen"))
