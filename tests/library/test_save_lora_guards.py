"""`save_lora`: what is refused, by name and with the remedy; and folders that survive errors, kills and edits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import bert, blocks, fast, train
from lora_checks import MLP, perturbed
from torch import nn
from toy_bert import WIDTH, toy_bert
from toy_models import toy_model

from sparsegrad import UserError, save_adapter, save_lora, to_linears


def test_the_card_states_the_errors_and_is_kept_once_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = toy_bert()
    model, card = perturbed(base), tmp_path / "README.md"
    for rank in (1, 2):
        saved = save_lora(model, tmp_path, base, rank=rank)
        for name, error in saved.errors.items():
            assert f"| `{name}` | {rank} | {error:.2g} |" in card.read_text()
        assert str(saved) in card.read_text()
    card.write_text(card.read_text() + "Trained on films.\n")
    save_lora(model, tmp_path, base, rank=3)
    assert "Trained on films." in card.read_text()
    assert "edited by hand" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rank=None and max_error=None: give one"),
        ({"rank": 4, "max_error": 0.1}, "rank=4 and max_error=0.1: give one"),
        ({"rank": 0}, "rank=0 .* at least 1"),
        ({"rank": 2.0}, "rank=2.0 .* whole number"),
        ({"rank": WIDTH + 1}, f"rank={WIDTH + 1}.* give a smaller rank"),
        (
            {"rank": WIDTH + 1, "target_modules": list(MLP)},
            rf"rank={WIDTH + 1} .* to {WIDTH};.*shorter side of .*intermediate\.dense is {WIDTH}",
        ),
        ({"max_error": 0}, "max_error=0 .* below 1"),
        ({"max_error": 1.0}, "max_error=1.0 .* below 1"),
        ({"max_error": float("nan")}, "max_error=nan .* below 1"),
        ({"rank": 2, "target_modules": ["nowhere"]}, "nowhere"),
        ({"rank": 2, "base": None}, "base=None.* give base="),
        ({"rank": 2, "base": {}}, "no linear that changed"),
        ({"rank": 2, "base": toy_model("llama", torch.float32)}, "differ in the tensors .* its own base"),
        ({"rank": 2, "base": toy_bert().double()}, "float64 in the base"),
    ],
)
def test_wrong_options_are_refused_and_write_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = toy_bert()
    with pytest.raises(UserError, match=message):
        save_lora(perturbed(base), tmp_path / "lora", **{"base": base, **options})
    assert not (tmp_path / "lora").exists()


def tie(model: Any) -> None:
    model.bert.encoder.layer[1].intermediate = model.bert.encoder.layer[0].intermediate


def own_parameter(model: Any) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))


def quantize(model: Any) -> None:
    weight = torch.ones(2, WIDTH, dtype=torch.int8)
    model.classifier.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (tie, r"tied under the names .*layer\.0\.intermediate.*layer\.1\.intermediate.*save_adapter"),
        (own_parameter, "scale is a tensor of a ToyBert, .*train_rest=false .*save_adapter"),
        (quantize, r"classifier\.weight is quantized .* dequantize"),
    ],
)
def test_models_that_peft_cannot_express_are_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    base = toy_bert()
    spoil(base)
    with pytest.raises(UserError, match=message):
        save_lora(perturbed(base, "scale", "intermediate"), tmp_path, base, rank=2)
    assert not list(tmp_path.iterdir())


def test_unchanged_and_diverged_models_are_refused(tmp_path: Path) -> None:
    base = toy_bert()
    with pytest.raises(UserError, match=r"equals its base .* train it first"):
        save_lora(copy.deepcopy(base), tmp_path, base, rank=2)
    model = perturbed(base)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"classifier\.bias is not finite: the training diverged"):
        save_lora(model, tmp_path, base, rank=2)
    assert not list(tmp_path.iterdir())


def test_a_base_that_engine_fast_changed_along_is_refused(tmp_path: Path) -> None:
    """It moves a weight in place, which is frozen while the core trains."""
    model = bert()
    state = model.state_dict()
    train(model, fast(model, train_rest=False, modules_to_save=[]))
    with pytest.raises(UserError, match=r"shares the memory of bert\..*dense\.weight with the model"):
        save_lora(model, tmp_path, state)
    to_linears(model)
    with pytest.raises(UserError, match=r"shares the memory of bert\..*dense\.weight with the model"):
        save_adapter(model, tmp_path, {name: value for name, value in state.items() if "classifier" not in name})


def test_wrapped_models_are_refused(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Sequential):
        """FSDP1 is recognized by this name."""

    base = toy_bert()
    for wrapper, remedy in ((FullyShardedDataParallel, "shard"), (nn.DataParallel, r"model\.module")):
        with pytest.raises(UserError, match=remedy):
            save_lora(wrapper(perturbed(base)), tmp_path, base, rank=2)
    assert not list(tmp_path.iterdir())


def test_a_base_that_the_cores_do_not_explain_is_refused_and_the_layers_come_back(tmp_path: Path) -> None:
    base = toy_bert()
    model = copy.deepcopy(base)
    train(model, fast(model))
    with pytest.raises(UserError, match=r"intermediate\.dense\.weight differs .*base= .*to_linears"):
        save_lora(model, tmp_path, toy_bert(seed=1))
    with pytest.raises(UserError, match=r"target_modules=.* needs rank="):
        save_lora(model, tmp_path, base, target_modules=list(MLP))
    assert len(blocks(model)) == 4
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    base = toy_bert()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.* choose another folder"):
        save_lora(perturbed(base), tmp_path / "file", base, rank=2)


@pytest.mark.parametrize("failing", ["save_tensors", "write_json"])
def test_after_an_error_the_old_adapter_is_complete(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toy_bert()
    save_lora(perturbed(base), tmp_path, base, rank=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"sparsegrad.adapter.lora_files.{failing}", fail)
    with pytest.raises(UserError, match="No space left"):
        save_lora(perturbed(base), tmp_path, base, rank=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fast_linears_that_have_not_trained_are_named_as_the_reason(tmp_path: Path) -> None:
    model = bert()
    base = copy.deepcopy(model)
    fast(model)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(UserError, match="no core of a fast linear has changed: train before saving, give rank="):
        save_lora(model, tmp_path / "lora", base=base)
