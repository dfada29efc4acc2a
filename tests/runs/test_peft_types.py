"""Every type that `method=peft` offers, with and without biases: it trains, continues, saves its adapter and merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_cases import fresh, prepared
from safetensors.torch import load_file
from test_methods import batch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsegrad import UserError, find_mlp
from sparsegrad.methods.peft import Peft
from sparsegrad.methods.peft_config import check_apart, list_types, make_config, wrap
from sparsegrad.methods.peft_size import describe_weights, fit_budget, measure_size, size_field

# Sizes for weights of 16 x 32, where not `r: 4`.
SIZES: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {"sparsity": 0.9},
    "WAVEFT": {"n_frequency": 20},
}
TYPES = list_types()


def settings(kind: str) -> dict[str, Any]:
    field = size_field(kind)
    return {"peft_type": kind, **SIZES.get(kind, {field: 4} if field else {})}


def llama() -> LlamaForCausalLM:
    """Linears without bias, and no head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes)).train()


MODELS = {"bert": fresh, "llama": llama}


def train(base: str, model: Any, result: Any, seeds: range) -> None:
    """One step per seed; a language model predicts its own tokens."""
    for seed in seeds:
        rows = batch(seed)
        labels = rows["labels"] if base == "bert" else rows["input_ids"]
        model(input_ids=rows["input_ids"], labels=labels).loss.backward()
        result.optimizer.step()
        result.optimizer.zero_grad()


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=batch(9)["input_ids"]).logits
    return found


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_continues_saves_and_merges(kind: str, base: str, tmp_path: Path) -> None:
    method, make = Peft(config=settings(kind), seed=3), MODELS[base]
    head = {} if base == "bert" else {"has_head": False, "is_head": lambda name: False}
    model = make()
    result = prepared(method, model, **head)
    train(base, model, result, range(2))
    model.save_pretrained(tmp_path / "checkpoint")  # as the Trainer does
    moments, draws = copy.deepcopy(result.optimizer.state_dict()), torch.get_rng_state()
    train(base, model, result, range(2, 3))

    other = make()
    torch.manual_seed(99)  # what is drawn anew must come from the checkpoint or from the method's seed
    again = prepared(method, other, **head)
    other.load_state_dict(load_file(tmp_path / "checkpoint" / "model.safetensors"))
    again.optimizer.load_state_dict(moments)
    torch.set_rng_state(draws)
    train(base, other, again, range(2, 3))
    assert all(torch.equal(one, other.state_dict()[key]) for key, one in model.state_dict().items())

    trained = answers(model)
    assert not torch.equal(trained, answers(make()))
    assert result.save is not None
    result.save(tmp_path / "adapter")
    served = PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    assert torch.allclose(answers(served), trained, atol=1e-6)
    result.finish()
    assert torch.allclose(answers(model), trained, atol=1e-5)
    merged = all(
        type(one) is nn.Linear for found in find_mlp(make()).values() for one in map(model.get_submodule, found)
    )
    assert merged is result.notes["merges"]
    assert merged is ((kind, base) != ("BEFT", "llama")), "its bias has no place in a linear without one"


def test_every_type_merges_whatever_autocast_a_run_prepares_it_under() -> None:
    linears = describe_weights(find_mlp(fresh()))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(measure_size(settings(kind), linears).merges for kind in TYPES)


@pytest.mark.parametrize("density", [0.03, 0.3])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if size_field(kind)])
def test_a_budget_is_met_within_a_factor_of_two_or_refused_with_what_can_be_reached(kind: str, density: float) -> None:
    node = {name: value for name, value in settings(kind).items() if name in ("peft_type", "group_size")}
    weights = describe_weights(find_mlp(fresh()))
    try:
        message, share = "", fit_budget(node, weights, density)["share"]
    except UserError as error:
        message, share = str(error), density
    assert density / 2 <= share <= 2 * density
    if message:
        bound = "most" if "largest" in message else "least"
        assert f"{size_field(kind)}=" in message
        assert f"give at {bound} density:" in message


def test_a_type_whose_layers_share_what_trains_is_refused_before_training() -> None:
    """As types of a later peft may; those that are known are refused by name."""
    model = fresh()
    shapes = {
        name: (one.out_features, one.in_features) for part in find_mlp(model).values() for name, one in part.items()
    }
    tuner = wrap(model, make_config({"peft_type": "LORA", "r": 2}, shapes))
    check_apart(tuner)
    first, second = (model.bert.encoder.layer[place].output.dense for place in (0, 1))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(UserError, match=r"peft_type=LORA .*layers share what trains"):
        check_apart(tuner)
