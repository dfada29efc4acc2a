"""Methods of peft and their kin from the command to what a run leaves: saved, continued and searched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_fixtures import LLAMA, tree, write_trees
from peft import PeftModel
from run_fixtures import Composer, last_wins
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from test_runs import Stop, curves
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sparsegrad import UserError, load_adapter
from sparsegrad.methods.peft_config import make_config, wrap
from sparsegrad.methods.peft_save import find_trained
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.records import read_record
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.sweeps.pool import run_sweep
from sparsegrad.sweeps.study import load_study

# Method -> its options, and the format of its adapter. Weights are 32 x 64.
CASES = {
    "peft/dora": (("method.budget=density:0.2",), "peft"),
    "peft/vera": (("method.config.r=4",), "peft"),  # its layers share projections, which no checkpoint holds
    "lora_sb": (("method.density=0.01", "method.steps=2"), "sparsegrad"),
    "static_mask": (("method.steps=2",), "sparsegrad"),
    "bitfit": ((), "sparsegrad"),
}
LONG = ("train.train_rest=false", "protocol.max_steps=6", "protocol.eval_steps=2")


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 15)[None]).logits
    return found


def continued(config: RunConfig) -> dict[str, Any]:
    """The record of a run that is interrupted after its second evaluation."""
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[Stop(5)])
    again = Stop()
    record, _ = run(config, callbacks=[again])
    assert again.began == 4
    return record


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_continued_and_saved_as_a_model_and_as_an_adapter(made: Made, source: Path, name: str) -> None:
    options, adapter = CASES[name]
    given = (f"method={name}", *options, *LONG, "save_model=true", f"save_adapter={adapter}")
    config = made(*given, "name=whole")
    whole, _ = run(config)
    assert bool(whole["calibration"].get("seconds")) is (name in ("lora_sb", "static_mask"))
    other = made(*given, "name=again", f"work_dir={config.work_dir}-again")
    again = continued(other)
    assert curves(again) == curves(whole)
    trained, same = (AutoModelForSequenceClassification.from_pretrained(model_folder(one)) for one in (config, other))
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in trained.state_dict().items())
    base = AutoModelForSequenceClassification.from_pretrained(source)
    if adapter == "peft":
        served = PeftModel.from_pretrained(base, config.adapter_folder)
    else:
        load_adapter(served := base, config.adapter_folder).merge()
    torch.testing.assert_close(answers(served), answers(trained), rtol=0, atol=1e-5)
    assert not torch.equal(answers(trained), answers(AutoModelForSequenceClassification.from_pretrained(source)))


@pytest.fixture
def language(conf: Composer, places: tuple[str, str], checkpoint: Path, tmp_path: Path) -> Any:
    """`language(*overrides)`: a run of a tiny Llama, with a method that linears without bias cannot hold."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    for file in checkpoint.glob("*token*"):
        shutil.copy(file, tmp_path / "llama")
    trees = write_trees(tmp_path / "trees.jsonl", [tree(number) for number in range(9)])
    kept = [one for one in LLAMA if not one.startswith(("model.weights", "model.architecture", "model.tokenizer"))]
    here = (f"model.source={tmp_path / 'llama'}", f"data.dir={trees}", *places)

    def built(*overrides: str) -> RunConfig:
        method = ("method=peft", "method.config.r=2", "method.config.lora_bias=true")
        return build(conf(*last_wins(*kept, *here, *method, *LONG, *overrides)))

    return built


def test_a_method_that_cannot_be_merged_is_evaluated_unmerged_and_saved_as_its_adapter(language: Any) -> None:
    config = language("save_adapter=peft", "name=whole")
    whole, _ = run(config)
    assert whole["method"]["merges"] is False
    assert whole["result"]["value"] < whole["evaluations"][0]["nll"]
    assert curves(continued(language("name=again", f"work_dir={config.work_dir}-again"))) == curves(whole)
    base = AutoModelForCausalLM.from_pretrained(config.model.source)
    before = answers(base)
    assert not torch.equal(answers(PeftModel.from_pretrained(base, config.adapter_folder)), before)


def test_weights_that_train_densely_are_in_the_adapter(made: Made, source: Path) -> None:
    """Their linears are stored whole, with the bias that is frozen."""
    layers = ("++model.kinds=[output]", "++model.dense=[intermediate]")
    config = made(
        "method=peft/dora", "method.budget=density:0.2", *layers, *LONG, "save_model=true", "save_adapter=peft"
    )
    run(config)
    trained = AutoModelForSequenceClassification.from_pretrained(model_folder(config))
    base = AutoModelForSequenceClassification.from_pretrained(source)
    torch.testing.assert_close(answers(PeftModel.from_pretrained(base, config.adapter_folder)), answers(trained))


def test_what_the_format_of_peft_cannot_hold_is_named() -> None:
    model: Any = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4), nn.Linear(4, 4))
    wrap(model, make_config({"peft_type": "LORA", "r": 2}, {"1": (4, 4)}))
    model[2].bias.requires_grad_(False)
    for name in ("0.0.weight", "0.0.bias", "2.weight"):
        model.get_parameter(name).requires_grad_(True)
    assert find_trained(model) == (["0.0", "2"], None)
    model[1].base_layer.bias.requires_grad_(True)
    assert find_trained(model)[1] == "1.base_layer.bias"
    model[1].base_layer.bias.requires_grad_(False)
    model.scale = nn.Parameter(torch.ones(1))
    assert find_trained(model)[1] == "scale"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("save_model=true",), r"save_model=true .*cannot merge method=peft.*use save_adapter=peft$"),
        (("save_adapter=lora", "train.train_rest=true"), r"cannot merge.*set train\.train_rest=false and save_adapter"),
        (("save_adapter=peft", "train.train_rest=true"), r"save_adapter=peft .*set train\.train_rest=false"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_a_remedy_that_is_possible(
    language: Any, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(language(*overrides))


@pytest.mark.parametrize("name", ["peft/dora", "lora_sb"])
def test_a_sweep_searches_the_settings_of_a_method(
    conf: Composer, small: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    given = [one for one in small if not one.startswith(("train.lr", "train.batch_size"))]
    space = "{train.lr:{float:[1e-4,1e-2],log:true},method.%s}" % (
        'budget:{choice:["density:0.1","density:0.2"]}' if name == "peft/dora" else "density:{float:[0.01,0.1]}"
    )
    run_sweep(
        conf(*given, f"method={name}", "sweep=custom", "sweep.trials=2", "sweep.study=searched", f"sweep.space={space}")
    )
    records = [read_record(path) for path in (tmp_path / "results" / "runs").rglob("*.json")]
    assert [record["status"] for record in records] == ["complete"] * 2
    field = "budget" if name == "peft/dora" else "density"
    study = load_study(f"{tmp_path}/results/studies/studies.db", "searched")
    searched = {trial.number: trial.params[f"method.{field}"] for trial in study.trials}
    assert searched == {record["sweep"]["trial"]: record["config"]["method"][field] for record in records}
