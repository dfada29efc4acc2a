"""`save_adapter=lora|sparsegrad`: what a run leaves as an adapter gives the trained model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from run_fixtures import Tiny
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification

from sparsegrad import load_adapter
from sparsegrad.adapter.format import FACTS
from sparsegrad.adapter.lora import check_changes
from sparsegrad.adapter.lora_files import CONFIG
from sparsegrad.errors import ResourceError, UserError
from sparsegrad.files import write_text
from sparsegrad.runs import runner, saving
from sparsegrad.runs.lora_check import make_outline
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import _write_adapter, check_saving, model_folder, restore_adapter

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


def test_a_lora_trained_beside_bfloat16_weights_is_saved_with_its_own_rank(made: Made, source: Path) -> None:
    alone = ("method=lora", "train.train_rest=false", "train.precision=bf16_weights", "train.lr=1e-3")
    config = made(*alone, "save_adapter=lora", "save_model=true")
    run(config)
    saved = PeftConfig.from_pretrained(config.adapter_folder)
    assert isinstance(saved, LoraConfig)
    assert max([saved.r, *saved.rank_pattern.values()]) <= 2, saved.rank_pattern
    trained = BertForSequenceClassification.from_pretrained(model_folder(config))
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}, "loaded without a loss"
    served = PeftModel.from_pretrained(base(source).bfloat16().float(), config.adapter_folder)
    torch.testing.assert_close(answers(served, source), answers(trained, source), rtol=0, atol=1e-3)


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
    fresh = made("method=sparsegrad", f"save_adapter={formats[1]}", "seed=7")
    run(fresh)
    assert names == {path.name for path in fresh.adapter_folder.iterdir()}
    assert "save_lora wrote this card" in (config.adapter_folder / "README.md").read_text() or formats[1] != "lora"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("before", "then", "part"),
    [
        ("save_adapter=lora", "save_adapter=sparsegrad", "write_changes"),
        ("save_adapter=sparsegrad", "save_adapter=lora", "write_matrices"),
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
    assert "notes.txt" in contents(folder)


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


@pytest.mark.parametrize("step", ["remove_files", "remove_card"])
def test_an_exchange_of_formats_that_is_killed_leaves_what_it_has_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """First the new files, then the old ones go: at no moment is there no adapter."""
    after = "sparsegrad" if step == "remove_files" else "peft"
    before, config = made("save_adapter=lora"), made(f"save_adapter={after}")
    entry = {"lora": CONFIG, "sparsegrad": FACTS, "peft": CONFIG}
    _write_adapter(before, lambda folder: write_text(folder / entry["lora"], "old"))

    def write(folder: Path) -> None:
        write_text(folder / entry[after], "new")

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, step, kill)
        with pytest.raises(KeyboardInterrupt):
            _write_adapter(config, write)
    assert (config.adapter_folder / entry[after]).read_text() == "new"
    assert (config.adapter_folder / CONFIG).exists()
    _write_adapter(config, write)
    assert contents(config.adapter_folder) == {entry[after]: b"new", ".sparsegrad_adapter.lock": b""}


def test_what_an_earlier_version_put_aside_comes_back(made: Made) -> None:
    config = made("save_adapter=lora")
    folder = config.adapter_folder
    write_text(folder.with_name(f".{folder.name}.old") / folder.name / CONFIG, "old")
    folder.with_name(f".{folder.name}.new").mkdir()
    restore_adapter(config)
    assert contents(folder) == {CONFIG: b"old"}
    assert list(folder.parent.iterdir()) == [folder]


class TrainsError(Exception):
    """A run came to its training."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=bitfit",), r"no linear that changed .*: give a smaller rank, or use save_adapter=sparsegrad$"),
        (("method=frozen",), r"no linear that changed .*: give a smaller rank, or use save_adapter=sparsegrad$"),
        (
            ("method=full", "adapter_rank=1000"),
            r"no linear that changed .*: give a smaller rank, or use save_adapter=sparsegrad$",
        ),
        (("method=full",), None),
        (("method=lora",), None),
        (("method=sparsegrad_fast",), None),
    ],
)
def test_what_no_lora_can_hold_is_refused_before_the_training(
    made: Made, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str | None
) -> None:
    def train(*_: Any) -> None:
        raise TrainsError

    monkeypatch.setattr(runner, "_run_trainer", train)
    with pytest.raises(TrainsError if message is None else UserError, match=message):
        run(made("save_adapter=lora", *overrides))


def test_tied_weights_that_will_train_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    outline = make_outline(model)
    assert outline[0].weight is outline[1].weight  # type: ignore[index]
    assert all(one.is_meta for one in outline.parameters())
    with pytest.raises(UserError, match=r"tied under the names 0\.weight, 1\.weight"):
        check_changes(outline, {"0.weight"}, set(), (), 2, None)
