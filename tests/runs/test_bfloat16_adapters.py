"""`train.precision=bf16_weights save_adapter=sparsegrad`: the adapter fits the base as the run loaded it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_states import bits, has_bits
from test_model_sources import Made
from test_model_sources import checkpoint as checkpoint  # fixtures
from test_model_sources import made as made
from test_model_sources import source as source
from transformers import BertForSequenceClassification

from sparsegrad import load_adapter
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder

CASES = {"lora": (), "lora_xs": (), "peft/dora": ("method.budget=density:0.2",), "sparsegrad": (), "bitfit": ()}


@pytest.mark.parametrize("method", CASES)
def test_an_adapter_of_bfloat16_weights_fits_a_base_in_bfloat16(made: Made, source: Path, method: str) -> None:
    settings = ("train.train_rest=false", "train.precision=bf16_weights", "train.lr=1e-3", "save_model=true")
    config = made(f"method={method}", *CASES[method], *settings, "save_adapter=sparsegrad")
    run(config)
    trained = BertForSequenceClassification.from_pretrained(model_folder(config))
    model, untouched = (
        BertForSequenceClassification.from_pretrained(source, dtype=torch.bfloat16).eval() for _ in range(2)
    )
    untouched.load_state_dict(model.state_dict())  # the new head
    adapter = load_adapter(model, config.adapter_folder)
    adapter.merge()
    assert all(torch.equal(one.float(), trained.state_dict()[name]) for name, one in model.state_dict().items())
    if method != "bitfit":  # on a CPU, autocast does not widen the weight of a norm whose bias alone trained
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(input_ids=torch.arange(3, 15)[None])
    adapter.unmerge()
    assert has_bits(model, bits(untouched))
    model.float()
    load_adapter(model, config.adapter_folder).merge()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None])
