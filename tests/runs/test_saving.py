"""`save_adapter=lora|sparsegrad`: what a run leaves as an adapter gives the trained model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from run_fixtures import Tiny
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from transformers import AutoTokenizer, BertForSequenceClassification

from sparsegrad import load_adapter
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.runs import saving
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import check_saving, model_folder

TEXTS = ["good film number 3", "bad dull film", "fine"]


def answers(model: Any, source: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    return logits


def base(source: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(source)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["method=sparsegrad_fast"], 1e-5),
        (["method=sparsegrad", "adapter_rank=32"], 1e-4),
        (["method=lora"], 1e-3),
        (["method=full"], 0.2),
    ],
)
def test_a_lora_of_a_run_serves_in_peft(made: Made, source: Path, overrides: list[str], tolerance: float) -> None:
    config = made(*overrides, "save_adapter=lora", "save_model=true")
    run(config)
    trained = answers(BertForSequenceClassification.from_pretrained(model_folder(config)), source)
    served = PeftModel.from_pretrained(base(source), config.adapter_folder)
    torch.testing.assert_close(answers(served, source), trained, rtol=0, atol=tolerance)
    assert (config.adapter_folder / "README.md").is_file()


def test_an_adapter_of_a_run_gives_the_trained_model(made: Made, source: Path) -> None:
    config = made("method=sparsegrad", "save_adapter=sparsegrad", "save_model=true")
    run(config)
    model = base(source)
    load_adapter(model, config.adapter_folder).merge()
    trained = BertForSequenceClassification.from_pretrained(model_folder(config))
    assert torch.equal(answers(model, source), answers(trained, source))
    assert f'base_model: "{source.name}"' in (config.adapter_folder / "README.md").read_text()


@pytest.mark.parametrize("formats", [("sparsegrad", "lora"), ("lora", "sparsegrad")])
def test_the_other_format_takes_the_place_of_the_first(made: Made, source: Path, formats: tuple[str, str]) -> None:
    """Both belong to one key; a refusal after the training would lose it."""
    for one in formats:
        config = made("method=sparsegrad", f"save_adapter={one}", "force=true")
        run(config)
    names = {path.name for path in config.adapter_folder.iterdir()}
    (fresh,) = (made("method=sparsegrad", f"save_adapter={formats[1]}", "seed=7"),)
    run(fresh)
    assert names == {path.name for path in fresh.adapter_folder.iterdir()}
    assert "save_lora wrote this card" in (config.adapter_folder / "README.md").read_text() or formats[1] != "lora"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("before", "then", "part"),
    [
        ("save_adapter=lora", "save_adapter=sparsegrad", "save_adapter"),
        ("save_adapter=sparsegrad", "save_adapter=lora", "save_lora"),
        ("save_model=true", "save_model=true", "share_tensors"),
    ],
)
def test_what_was_saved_stays_if_its_successor_cannot_be_written(
    made: Made, monkeypatch: pytest.MonkeyPatch, before: str, then: str, part: str
) -> None:
    """The record, which says complete, stays as well."""
    config = made("method=sparsegrad", before)
    run(config)
    folder = model_folder(config) if "model" in before else config.adapter_folder
    (folder / "notes.txt").write_text("of the user")
    found = contents(folder)

    def full(*_: Any, **__: Any) -> None:
        raise ResourceError("the disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(saving, part, full)
        with pytest.raises(ResourceError):
            run(made("method=sparsegrad", then, "force=true"))
    assert contents(folder) == found
    assert list(folder.parent.iterdir()) == [folder]
    run(made("method=sparsegrad", then, "force=true"))
    assert list(folder.parent.iterdir()) == [folder]
    assert ("notes.txt" in contents(folder)) == ("model" in before)


def test_the_adapter_is_no_part_of_the_key(made: Made) -> None:
    assert made("save_adapter=lora").key == made().key


def test_what_cannot_be_saved_is_refused_before_anything_is_loaded(tiny: Tiny, made: Made) -> None:
    with pytest.raises(UserError, match=r"save_adapter=lora.*random weights"):
        run(tiny("save_adapter=lora"))
    with pytest.raises(UserError, match=r"save_adapter=sparsegrad.*model\.pooling=mean"):
        run(made("save_adapter=sparsegrad", "model.pooling=mean"))
    with pytest.raises(UserError, match=r"adapter_rank=4.*save_adapter=lora"):
        made("adapter_rank=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=lora",), r"method=lora is not one of peft's; use save_adapter=lora"),
        (("method=peft/dora",), r"does not hold the rest .*; set train\.train_rest=false"),
    ],
)
def test_an_adapter_of_peft_names_the_condition_that_fails(
    made: Made, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=rf"save_adapter=peft is not allowed: .*{message}"):
        check_saving(made("save_adapter=peft", *overrides))
    check_saving(made("save_adapter=peft", "method=peft/dora", "train.train_rest=false"))
