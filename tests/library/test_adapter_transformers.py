"""Adapters of transformers' models: their folders as base, and beside what peft saves."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from adapter_checks import check_merge_and_unmerge, check_tolerance, train
from model_states import bits, has_bits
from safetensors.torch import load_file

from sparsegrad import UserError, load_adapter, prepare, save_adapter
from sparsegrad.adapter.format import FACTS

pytest.importorskip("transformers")

from model_zoo import tiny_batches, tiny_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bert", "gpt2", "t5"])
def test_merge_gives_the_trained_model_and_unmerge_the_base_bit_for_bit(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_merge_and_unmerge(tiny_model(layout, dtype), tiny_batches(layout, 4), tmp_path)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_with_a_tolerance_kept_entries_are_stored_and_keep_their_promise(layout: str, tmp_path: Path) -> None:
    check_tolerance(tiny_model(layout, torch.float32), tiny_batches(layout, 4), tmp_path)


def test_a_folder_is_the_base_of_a_model_of_which_a_part_was_converted(tmp_path: Path) -> None:
    """As for training in bfloat16 with the normalization in float32."""
    tiny_model("bert", torch.bfloat16).save_pretrained(tmp_path / "base")

    def load() -> torch.nn.Module:
        model = type(tiny_model("bert")).from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
        return model

    model, fresh = load(), load()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "dense.weight" in name:
                weight += 1
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter").merge()
    assert has_bits(fresh, bits(model))


def test_a_folder_is_a_base_and_a_head_that_it_lacks_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As from the hub: the saved base has no classifier, each load draws another one, the adapter brings its own."""
    caplog.set_level(logging.WARNING, "transformers")
    base = tiny_model("bert", torch.float32)
    base.bert.save_pretrained(tmp_path / "base")
    model, fresh = (type(base).from_pretrained(tmp_path / "base") for _ in range(2))
    assert not torch.equal(model.classifier.weight, fresh.classifier.weight)
    model.eval()
    train(model, tiny_batches("bert", 4))
    numbers = torch.get_rng_state()
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    save_adapter(model, tmp_path / "adapter")  # the base is where from_pretrained found it
    assert "LOAD REPORT" not in caplog.text, "the user has seen it at the first load"
    assert torch.equal(numbers, torch.get_rng_state())
    adapter, before = load_adapter(fresh, tmp_path / "adapter"), bits(fresh)
    adapter.merge()
    assert has_bits(fresh, bits(model))
    adapter.unmerge()
    assert has_bits(fresh, before)
    assert json.loads((tmp_path / "adapter" / FACTS).read_text())["base"] == "base"
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_folder_of_another_architecture_is_no_base(tmp_path: Path) -> None:
    """`from_pretrained` draws what the files lack and only warns."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"llama does not have bert\..* and 1 more of the model: name the base"):
        save_adapter(tiny_model("bert", torch.float32), tmp_path / "adapter", tmp_path / "llama")
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a name on the hub: .* base="):
        save_adapter(tiny_model("bert"), tmp_path / "adapter", "nowhere/at-all-" + "x" * 99)
    assert not (tmp_path / "adapter").exists()


def test_the_size_beside_lora_is_what_peft_saves(tmp_path: Path) -> None:
    """keep = 48 of weights (32, 16): rank 1."""
    peft = pytest.importorskip("peft")
    base = tiny_model("bert", torch.float32)
    model = copy.deepcopy(base)
    saved = save_adapter(model, tmp_path / "adapter", base, train(model, tiny_batches("bert", 4), keep=48))
    names = [r"intermediate.dense", r"layer.0.output.dense", r"layer.1.output.dense"]
    peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=names)).save_pretrained(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert saved.lora_bytes == sum(tensor.nbytes for tensor in stored.values()) == 4 * 4 * 48


@pytest.mark.parametrize("targets", ["intermediate.dense", "query"])  # an MLP linear, or none
@pytest.mark.parametrize("through", ["peft", "transformers"])
def test_a_peft_model_is_refused_with_the_remedy(targets: str, through: str) -> None:
    """Where LoRA wraps no MLP linear, the weights are frozen only; to unfreeze them would train both methods."""
    peft = pytest.importorskip("peft")
    model, lora = tiny_model("bert"), peft.LoraConfig(target_modules=[targets])
    if through == "peft":
        model = peft.get_peft_model(model, lora)
    else:
        model.add_adapter(lora)
    with pytest.raises(UserError, match=rf"{targets} is wrapped by peft: give the plain model.* merge_and_unload\(\)"):
        prepare(model, tiny_batches("bert", 2), calibration_steps=2)


def test_a_base_folder_from_before_the_embeddings_were_resized_is_refused_with_the_remedy(tmp_path: Path) -> None:
    base = tiny_model("bert", torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    model.resize_token_embeddings(54)
    resized = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(UserError, match=r"other shapes .*base= as a copy"):
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", resized)
