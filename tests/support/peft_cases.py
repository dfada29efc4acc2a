"""Methods of peft and their kin on a tiny BERT, with sizes for weights of 16 x 32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_cases import HAS_LORA_GA, bert
from run_fixtures import ROOT, Composer
from test_methods import batch, context
from transformers import BertForSequenceClassification

from sparsegrad import find_mlp
from sparsegrad.methods.base import Prepared
from sparsegrad.runs.config import build

READY = sorted(path.stem for path in (ROOT / "conf" / "method" / "peft").glob("*.yaml"))
KIN = ("lora_xs", "lora_sb", "static_mask", "random_mask", "sparsegrad_static", "bitfit", "frozen")
SIZES = {"fourierft": 0.05, "waveft": 0.05, "boft": 0.3, "randlora": 0.5, "miss": 0.2}  # of 16 x 32


def fresh() -> BertForSequenceClassification:
    model: BertForSequenceClassification = bert(torch.float32)
    return model


def made(conf: Composer, name: str, *overrides: str) -> Any:
    """The method of a YAML, with a size for weights of 16 x 32."""
    kin = name in KIN
    size = "" if name in ("ia3", "vera", "bitfit", "frozen") else str(SIZES.get(name, 0.1))
    sized = [f"method.density={size}" if kin else f"method.budget=density:{size}"] if size else []
    steps = ["method.steps=2"] if name in ("lora_sb", "static_mask", "sparsegrad_static", "lora_ga") else []
    found = build(conf(f"method={name if kin else f'peft/{name}'}", "task=sst2", *sized, *steps, *overrides)).method
    assert found.name == name, "the option's last part, by which tables and studies name it"
    return found


def prepared(method: Any, model: Any, **changes: Any) -> Prepared:
    linears = find_mlp(model)
    method.check(linears)
    return method.prepare(model, linears, context(**{"train_rest": False, **changes}))


def train(model: Any, result: Prepared, steps: range) -> None:
    for seed in steps:
        model(**batch(seed)).loss.backward()
        result.optimizer.step()
        result.optimizer.zero_grad()


needs_lora_ga = pytest.mark.skipif(not HAS_LORA_GA, reason="of peft 0.19")
