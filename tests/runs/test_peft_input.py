"""Methods of peft and their kin: bad input is one line, and what the installed peft lacks is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import fresh, needs_lora_ga, prepared
from transformers.pytorch_utils import Conv1D

from sparsegrad import UserError, find_mlp
from sparsegrad.methods.floors import Frozen
from sparsegrad.methods.lora_sb import LoraSb
from sparsegrad.methods.lora_xs import LoraXs
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.peft_config import list_types
from sparsegrad.methods.sparsegrad import SparseGrad
from sparsegrad.methods.static_mask import StaticMask


def peft_of(**fields: Any) -> Any:
    return lambda: Peft(config=fields)


BAD: list[tuple[Any, str]] = [
    (peft_of(peft_type="SHIRRA"), "did you mean SHIRA"),
    (peft_of(peft_type="LORA", rank=3), "did you mean r?"),
    (peft_of(peft_type="LORA", target_modules=["q"]), "model.mlp"),
    (peft_of(peft_type="LORA", bias="all"), "train.train_rest"),
    (peft_of(peft_type="LORA", alora_invocation_tokens=[1, 2]), "nothing would train; leave it out"),
    (peft_of(peft_type="PREFIX_TUNING"), "prompts"),
    (peft_of(peft_type="TRAINABLE_TOKENS"), "embeddings"),
    *((peft_of(peft_type=kind), f"{kind} is not allowed: its layers share") for kind in ("VBLORA", "TINYLORA", "LILY")),
    *(
        (
            peft_of(peft_type="LORA", init_lora_weights=init),
            f"{init} is not allowed: peft's {init.upper() if init == 'eva' else 'CorDA'}",
        )
        for init in ("eva", "corda")
    ),
    (
        lambda: Peft(config={"peft_type": "LORA", "r": 3}, budget="density:0.1"),
        "to keep method.config.r=3, add method.budget=null",
    ),
    (
        lambda: Peft(config={"peft_type": "LORA", "rank_pattern": {"output.dense": 8}}, budget="density:0.1"),
        "rank_pattern={'output.dense': 8} and method.budget=density:0.1 both set the size: to keep",
    ),
    (lambda: Peft(config={"peft_type": "LORA"}, budget="1%"), "density:0.01"),
    (lambda: prepared(Peft(config={"peft_type": "LORA", "r": 0}), fresh()), "`r` should be a positive"),
    (peft_of(peft_type="LORA", r="eight"), "method.config.r=eight is not allowed: give a whole number"),
    (peft_of(peft_type="LORA", r="8"), "method.config.r='8' is not allowed: give a whole number"),
    (peft_of(peft_type="LORA", r=8.5), "method.config.r=8.5 is not allowed: give a whole number"),
    (peft_of(peft_type="LORA", r=None), "method.config.r=null is not allowed: give a whole number"),
    (peft_of(peft_type="LORA", r=True), "method.config.r=True is not allowed: give a whole number"),
    (peft_of(peft_type="LORA", lora_alpha="x"), "lora_alpha=x is not allowed: give a number"),
    (peft_of(peft_type="LORA", lora_dropout=[0.1]), "lora_dropout=[0.1] is not allowed: give a number"),
    (peft_of(peft_type="LORA", use_dora="yes"), "use_dora=yes is not allowed: give true or false"),
    (
        peft_of(peft_type="LORA", init_lora_weights=3),
        "init_lora_weights=3 is not allowed: give true or false or a text",
    ),
    (peft_of(peft_type="LORA", rank_pattern=3), "rank_pattern=3 is not allowed: give a mapping"),
    (
        lambda: prepared(Peft(config={"peft_type": "LORA"}, budget="density:0.001"), fresh()),
        "the smallest share of LORA is 0.094, with r=1; give at least",
    ),
    (lambda: prepared(Peft(config={"peft_type": "IA3"}, budget="density:0.1"), fresh()), "intermediate 32, output 32"),
    (
        lambda: Peft(config={"peft_type": "OSF"}).check(find_mlp(fresh().bfloat16())),
        "cannot multiply with weights in torch.bfloat16; set train.precision=bf16 or fp32",
    ),
    (lambda: prepared(Peft(config={"peft_type": "C3A", "block_size": 5}), fresh()), "refuses these settings of C3A"),
    (lambda: Peft(config={"peft_type": "LORA"}).check({"up": {"a": Conv1D(4, 3)}}), "not Conv1D"),
    (lambda: prepared(Frozen(), fresh(), has_head=False, is_head=lambda name: False), "method=bitfit"),
    (lambda: prepared(LoraXs(density=1e-4), fresh()), "makes the rank of intermediate 0"),
    (lambda: LoraSb(density=0.1, rank=2), "give one"),
    (lambda: StaticMask(choice="best"), "gradient, random"),
    (lambda: SparseGrad(static=True, moments="support"), "moments=support has no effect"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_lora_ga
def test_lora_ga_needs_calibration_batches() -> None:
    with pytest.raises(UserError, match=r"method\.steps=null"):
        Peft(config={"peft_type": "LORA", "init_lora_weights": "lora_ga"}, steps=None)


@pytest.mark.skipif("ADAMSS" not in list_types(), reason="of peft 0.19")
def test_a_field_that_needs_calls_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"use_asa=True .*calls of its own"):
        Peft(config={"peft_type": "ADAMSS", "use_asa": True})


def test_an_initialisation_that_the_installed_peft_lacks_is_named_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    earlier = dataclasses.make_dataclass("Earlier", ["r", "init_lora_weights"])
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA, earlier)
    with pytest.raises(UserError, match=r"init_lora_weights=lora_ga is not in peft .*came with peft 0\.19"):
        Peft(config={"peft_type": "LORA", "init_lora_weights": "lora_ga"})


def test_a_type_that_the_installed_peft_lacks_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    without = [one for one in list_types() if one != "HIRA"]
    monkeypatch.setattr("sparsegrad.methods.peft_config.list_types", lambda: without)
    with pytest.raises(UserError, match=r"HIRA.*came with peft 0\.20.*pip install -U"):
        Peft(config={"peft_type": "HIRA"})
