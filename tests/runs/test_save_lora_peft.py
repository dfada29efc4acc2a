"""`save_lora` against peft itself: a fresh base with the adapter loaded, and merged, is the trained model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import ZOO, tiny_batches, tiny_model
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from sparsegrad import SavedLora, UserError, find_mlp, prepare, save_lora, to_linears

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None}


def batches(layout: str) -> list[dict[str, Tensor]]:
    return [
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        for batch in tiny_batches(layout, 4)
    ]


def train(base: nn.Module, layout: str, train_rest: bool, **options: Any) -> Any:
    """A trained copy of `base`: with `train_rest` all of it but tied embeddings, else the MLP weights and the head."""
    model: Any = copy.deepcopy(base)
    mlp = {f"{name}.weight" for found in find_mlp(model).values() for name in found}
    tied = ("shared.", "wte.") if layout in ("gpt2", "t5") else ()
    for name, parameter in model.named_parameters():
        wanted = name not in tied and not name.startswith(("lm_head.", "transformer.wte.", "shared."))
        parameter.requires_grad_(name in mlp or name.startswith("classifier.") or (train_rest and wanted))
    options = {"density": 0.1, "lr": 1e-2, "calibration_steps": 2, **options}
    optimizer = prepare(model, batches(layout), **options)
    for batch in batches(layout):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def load(base: nn.Module, folder: Path, layout: str) -> Any:
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert isinstance(model.peft_config["default"], LoraConfig)
    assert model.peft_config["default"].task_type == TASKS.get(layout, model.peft_config["default"].task_type)
    return model


@torch.no_grad()
def logits(model: Any, layout: str) -> Tensor:
    model.eval()
    found: Tensor = model(**batches(layout)[0]).logits
    return found


def check_reload(model: Any, base: Any, saved: SavedLora, layout: str, tolerance: float = 1e-5) -> None:
    """Loaded, and merged, the base has the logits of `model`; merged also its weights; switched off, its own logits."""
    wanted = logits(model, layout)
    assert (wanted - logits(base, layout)).abs().max() > 10 * tolerance, "else this test tests nothing"
    reloaded = load(base, saved.folder, layout)
    assert set(reloaded.base_model.targeted_module_names) == set(saved.ranks)
    torch.testing.assert_close(logits(reloaded, layout), wanted, rtol=0, atol=tolerance)
    with reloaded.disable_adapter():
        torch.testing.assert_close(logits(reloaded, layout), logits(base, layout), rtol=0, atol=1e-6)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, layout), wanted, rtol=0, atol=tolerance)
    trained = to_linears(model).state_dict()
    torch.testing.assert_close(dict(merged.state_dict()), dict(trained), rtol=0, atol=tolerance)


@pytest.mark.parametrize("train_rest", [True, False])
@pytest.mark.parametrize("layout", [layout for layout in ZOO if layout != "gpt2"])  # its Conv1D has no engine fast
def test_fast_is_exact(layout: str, train_rest: bool, tmp_path: Path) -> None:
    base = tiny_model(layout, torch.float32)
    model = train(base, layout, train_rest, engine="fast")
    saved = save_lora(model, tmp_path, base)
    assert set(saved.ranks.values()) == {5}  # min(c, r) of cores of density 0.1 in weights (32, 16)
    if layout == "llama":
        assert saved.obstacles == (("modules_to_save",) if train_rest else ()), "vLLM and llama.cpp serve it"
    check_reload(model, base, saved, layout)


@pytest.mark.parametrize("train_rest", [True, False])
@pytest.mark.parametrize("layout", list(ZOO))
def test_the_exact_engine_within_max_error(layout: str, train_rest: bool, tmp_path: Path) -> None:
    """With 1e-6 nothing is lost; the ranks differ by layer, so peft's patterns of ranks must be right."""
    base = tiny_model(layout, torch.float32)
    model = train(base, layout, train_rest)
    saved = save_lora(model, tmp_path, base, max_error=1e-6)
    check_reload(model, base, saved, layout)


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_full_rank_of_the_exact_engine_reproduces_the_model(layout: str, tmp_path: Path) -> None:
    base = tiny_model(layout, torch.float32)
    model = train(base, layout, train_rest=False)
    saved = save_lora(model, tmp_path, base, rank=16)
    assert set(saved.ranks.values()) == {16}
    check_reload(model, base, saved, layout)


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_a_truncation_misses_as_much_as_it_states(layout: str, tmp_path: Path) -> None:
    base = tiny_model(layout, torch.float32)
    model = train(base, layout, train_rest=True)
    saved = save_lora(model, tmp_path, base, rank=3)
    merged = load(base, tmp_path, layout).merge_and_unload()
    for name, error in saved.errors.items():
        old, new, now = (one.get_submodule(name).weight.detach().double() for one in (base, model, merged))
        assert float((new - now).norm() / (new - old).norm()) == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 1
    other = {
        name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in saved.ranks
    }
    for name, tensor in other.items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_bfloat16_reloads(tmp_path: Path) -> None:
    base = tiny_model("llama", torch.bfloat16)
    model = train(base, "llama", train_rest=False, engine="fast")
    save_lora(model, tmp_path, base)
    reloaded = load(base, tmp_path, "llama")
    torch.testing.assert_close(logits(reloaded, "llama"), logits(model, "llama"), rtol=0, atol=0.05)


def test_a_folder_is_the_base_and_its_path_stays_private(tmp_path: Path) -> None:
    """As from the hub: the saved base has no classifier, so each load initializes another one."""
    tiny_model("bert", torch.float32).bert.save_pretrained(tmp_path / "base")
    cls = type(tiny_model("bert"))
    fresh = cls.from_pretrained(tmp_path / "base").eval()
    model = train(cls.from_pretrained(tmp_path / "base").eval(), "bert", train_rest=True, engine="fast")
    saved = save_lora(model, tmp_path / "lora")
    assert PeftConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == "base"
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in saved.folder.iterdir())
    check_reload(model, fresh, saved, "bert")


def test_a_checkpoint_of_another_architecture_is_no_base(tmp_path: Path) -> None:
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "llama")
    base = tiny_model("bert", torch.float32)
    model = train(base, "bert", train_rest=True)
    with pytest.raises(UserError, match=r"llama does not have .*name the base"):
        save_lora(model, tmp_path / "lora", tmp_path / "llama", rank=2)


@pytest.mark.parametrize("target", ["classifier.dense", "pre_classifier"])
def test_a_target_inside_what_peft_stores_whole_is_refused(target: str, tmp_path: Path) -> None:
    """peft stores every module whose name ends in `classifier` whole for this task type."""
    layout = "roberta" if "." in target else "distilbert"
    base = tiny_model(layout, torch.float32)
    model = train(base, layout, train_rest=True)
    with pytest.raises(UserError, match=rf"stored whole .*{target}.* target_modules="):
        save_lora(model, tmp_path, base, rank=2, target_modules=[target])


def test_a_tied_embedding_that_changed_is_refused(tmp_path: Path) -> None:
    base = tiny_model("gpt2", torch.float32)
    model = copy.deepcopy(base)
    model.transformer.wte.weight.data += 1
    with pytest.raises(UserError, match=r"tied .*wte\.weight, lm_head\.weight.*save_adapter"):
        save_lora(model, tmp_path, base, rank=2)


def test_a_peft_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model("bert", torch.float32)
    model = train(base, "bert", train_rest=False, engine="fast")
    save_lora(model, tmp_path, base)
    with pytest.raises(UserError, match="differ in the tensors"):
        save_lora(load(base, tmp_path, "bert"), tmp_path, base, rank=2)


def test_peft_saves_and_trains_what_it_loaded(tmp_path: Path) -> None:
    """The adapter is an ordinary one: peft writes it again with the same tensors."""
    base = tiny_model("bert", torch.float32)
    model = train(base, "bert", train_rest=True, engine="fast")
    save_lora(model, tmp_path / "one", base)
    load(base, tmp_path / "one", "bert").save_pretrained(tmp_path / "two")
    reloaded = load(base, tmp_path / "two", "bert")
    torch.testing.assert_close(logits(reloaded, "bert"), logits(model, "bert"), rtol=0, atol=1e-5)
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "two", is_trainable=True)
    trainable(**batches("bert")[0]).loss.backward()
    assert any("lora_A" in name and p.grad is not None and p.grad.any() for name, p in trainable.named_parameters())
