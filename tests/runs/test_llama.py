"""Language models through the whole run: what trains, in which precision, how it is scored, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llama_fixtures import LLAMA, tiny_llama, tree, write_trees
from run_fixtures import Composer, last_wins

from sparsegrad import Basis
from sparsegrad.errors import UserError
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.methods.base import set_trainable
from sparsegrad.metrics.language import language_metrics, token_losses
from sparsegrad.runs.config import RunConfig, build
from sparsegrad.runs.preflight import check_precision
from sparsegrad.runs.runner import run
from sparsegrad.runs.saving import model_folder
from sparsegrad.runs.trainer_setup import training_arguments

METHODS = ("full", "lora", "meprop", "sparsegrad", "sparsegrad_fast")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trees(tmp_path_factory.mktemp("trees") / "trees.jsonl", [tree(i) for i in range(30)])


@pytest.fixture
def llama(conf: Composer, trees: Path, places: tuple[str, str]) -> Any:
    """`llama(*overrides)`: the checked configuration of a run of a second."""

    def built(*overrides: str) -> RunConfig:
        return build(conf(*last_wins(*LLAMA, f"data.dir={trees}", *places, *overrides)))

    return built


def steps(method: str) -> list[str]:
    return ["method.steps=2"] if method.startswith("sparsegrad") else []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_of_the_chosen_blocks_alone(llama: Any, method: str) -> None:
    config = llama(f"method={method}", *steps(method), "protocol.max_steps=8", "save_model=true")
    record, _ = run(config)
    start, *trained = record["evaluations"]
    assert start["step"] == 0
    assert record["result"]["value"] == min(row["nll"] for row in trained) < start["nll"]
    assert record["result"]["scores"]["perplexity"] == pytest.approx(np.exp(record["result"]["value"]))
    assert 0 < record["trainable"]["share"] < 0.1
    _check_moved(config)


def _check_moved(config: RunConfig) -> None:
    """Of all parameters only up and down of blocks 0 and 3 differ from the fresh model's."""
    from transformers import AutoModelForCausalLM, set_seed

    from sparsegrad.models.loading import load_model, load_tokenizer

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    fresh = load_model(config.model, config.task, tokenizer).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(model_folder(config)).state_dict()
    moved = {name for name, value in tuned.items() if not torch.equal(value, fresh[name])}
    assert moved == {f"model.layers.{block}.mlp.{kind}_proj.weight" for block in (0, 3) for kind in ("up", "down")}


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_with_checkpointing_learn_too(llama: Any, method: str) -> None:
    overrides = ("train.precision=bf16_weights", "train.gradient_checkpointing=true", "train.lr=0.1")
    record, _ = run(llama(f"method={method}", *steps(method), *overrides, "protocol.max_steps=8"))
    assert record["result"]["value"] < record["evaluations"][0]["nll"]


def test_gate_trains_densely_beside_the_sparse_kinds(llama: Any) -> None:
    plain, _ = run(llama("method=sparsegrad", "method.steps=1"))
    record, _ = run(llama("method=sparsegrad", "method.steps=1", "model.dense=[gate]"))
    assert record["trainable"]["total"] == plain["trainable"]["total"] + 2 * 32 * 64


def test_small_updates_add_up_although_the_model_is_bfloat16() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    rounded = weight.detach().clone()
    set_trainable(weight, True)
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        rounded -= 1e-4
    assert torch.allclose(weight.detach(), torch.full((4,), 0.99), atol=1e-5)
    assert torch.equal(rounded, torch.ones(4, dtype=torch.bfloat16))  # what bfloat16 itself would have done


def test_a_frozen_weight_keeps_its_precision() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    set_trainable(weight, False)
    assert weight.dtype == torch.bfloat16


def test_the_loss_is_weighted_by_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1, 2:] = -100
    each = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="none")
    sums = token_losses(logits, labels)
    found = language_metrics(SimpleNamespace(predictions=sums.numpy()))  # type: ignore[arg-type]
    assert found["tokens"] == 5
    assert found["nll"] == pytest.approx(float(each.sum() / 5))
    with pytest.raises(UserError, match="diverged"):
        language_metrics(SimpleNamespace(predictions=np.array([[np.nan, 1.0]])))  # type: ignore[arg-type]


def test_accumulation_gives_the_loss_of_the_whole_batch(llama: Any) -> None:
    masked = ("task.mask_prompt=true", "method=full", "protocol.max_steps=2", "protocol.eval_steps=2")
    whole, _ = run(llama(*masked, "train.batch_size=4"))
    parts, _ = run(llama(*masked, "train.batch_size=2", "train.grad_accumulation=2"))
    assert parts["result"]["value"] == pytest.approx(whole["result"]["value"], rel=1e-4)


def test_lower_is_better(llama: Any) -> None:
    config = llama("method=full", "train.lr=5", "protocol.max_steps=6", "protocol.eval_steps=2")
    record, _ = run(config)
    trained = [row["nll"] for row in record["evaluations"] if row["step"]]
    assert record["result"]["value"] == min(trained)


def test_checkpointing_changes_memory_and_no_number(llama: Any) -> None:
    plain, _ = run(llama("method=full"))
    checkpointed, _ = run(llama("method=full", "train.gradient_checkpointing=true"))
    assert checkpointed["result"]["value"] == pytest.approx(plain["result"]["value"], rel=1e-6)


def test_lora_takes_the_selected_blocks_or_all(llama: Any) -> None:
    entries = 2 * 2 * (32 + 64)  # up and down, rank 2
    assert run(llama("method=lora"))[0]["trainable"]["total"] == 2 * entries
    assert run(llama("method=lora", "model.blocks=null"))[0]["trainable"]["total"] == 4 * entries


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_another_model_of_gate_up_and_down_is_a_matter_of_yaml(llama: Any, architecture: str) -> None:
    other = ("model.name=other", f"model.architecture.model_type={architecture}", "model.blocks=[1]")
    record, _ = run(llama("method=full", *other))
    assert record["trainable"]["per_weight"] == {"up": 2048, "down": 2048}
    assert record["trainable"]["total"] == 2 * 2048
    assert record["result"]["value"] < record["evaluations"][0]["nll"]


def test_micro_batches_unite_their_selections_in_engine_layer() -> None:
    """The authors' accumulation: each micro-batch adds its own kept entries; engine merged selects once, of the sum."""
    torch.manual_seed(0)
    linear, keep = torch.nn.Linear(6, 8, bias=False), 5
    inputs = [torch.randn(3, 6), torch.randn(3, 6)]

    def gradient(batches: list[torch.Tensor]) -> torch.Tensor:
        layer = SparseGradLinear.from_linear(linear, Basis.identity(8, 6), keep=keep)
        for x in batches:
            layer(x).square().sum().backward()
        assert layer.rotated_weight.grad is not None
        return layer.rotated_weight.grad.to_dense()

    parts = [gradient([x]) for x in inputs]
    united = gradient(inputs)
    assert [int((part != 0).sum()) for part in parts] == [keep, keep]
    assert keep < int((united != 0).sum()) <= 2 * keep
    assert torch.allclose(united, parts[0] + parts[1])


def test_accumulation_in_engine_layer_runs_in_bfloat16_with_checkpointing(llama: Any) -> None:
    layer = ("method=sparsegrad", "method.steps=1", "method.engine=layer", "train.grad_accumulation=2", "train.lr=0.1")
    record, _ = run(llama(*layer, "train.precision=bf16_weights", "train.gradient_checkpointing=true"))
    assert record["result"]["value"] < record["evaluations"][0]["nll"]


def test_plan_and_counts_are_shown_before_training(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(llama("method=lora", "protocol.max_steps=1", "protocol.eval_steps=1"))
    shown = caplog.text
    for part in ("weights", "gradients", "optimizer", "bases", "activations"):
        assert re.search(rf"estimated memory in GiB:.*{part} \d", shown)
    assert "the paper says of lora: 0.5 %" in shown
    assert "train conversations authors 44,042" in shown
    assert "validation conversations authors 2,241" in shown


def test_schedule_and_warm_up_reach_the_trainer(llama: Any) -> None:
    arguments = training_arguments(llama("train.warmup_steps=7"), rows=100, resuming=False)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("cosine", 7)


def test_table6_is_section_5_2(conf: Composer) -> None:
    config = build(conf("experiment=table6", "method=sparsegrad"))
    method: Any = config.method
    assert (method.keep, method.density, config.train.lr) == (100000, None, 9e-4)
    assert (config.train.batch_size, config.train.grad_accumulation, config.train.warmup_steps) == (2, 32, 50)
    assert (config.train.schedule, config.data.max_length, config.protocol.epochs) == ("cosine", 512, 1)
    lora: Any = build(conf("experiment=table6", "method=lora")).method
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 32, 0.05)
    assert build(conf("experiment=table6_authors", "method=full")).model.dense == ["gate"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.blocks=[0,9]",), "block 9 does not exist: the model has 4 blocks"),
        (("model.usual.keep=100000",), "has 2048 entries"),
        (("task.langs=[fr]",), "no conversation is left"),
        (("train.batch_size=20", "data.max_length=128"), "windows"),
        (("task.format=chat",), "has no chat template"),
        (
            ("model.architecture.model_type=bert",),
            r"needs a causal language model, and model=smollm2 \(bert, from .*\) sees both",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(llama: Any, overrides: tuple[str, ...], says: str) -> None:
    config = llama("method=sparsegrad", *overrides)
    with pytest.raises(UserError, match=says):
        run(config)
    assert not config.record_path.exists()


def test_bf16_needs_hardware_that_has_it(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = llama("train.precision=bf16_weights")
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16"):
        check_precision(config, torch.device("cuda"))
    check_precision(config, torch.device("cpu"))
    check_precision(llama("train.precision=fp32"), torch.device("cuda"))


def test_a_gated_model_says_how_to_get_access(conf: Composer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import GatedRepoError

    from sparsegrad.assets import hub
    from sparsegrad.models.loading import load_tokenizer

    def refuse(*_: Any, **__: Any) -> None:
        # Of httpx or httpx2, by the version of huggingface_hub.
        response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("Access is restricted", response=response)

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    config = build(conf("experiment=table6"))
    with pytest.raises(UserError, match=r"meta-llama/Llama-2-7b-hf is gated: ask for access .*hf auth login"):
        load_tokenizer(config.model)


def test_a_missing_folder_of_weights_is_named(conf: Composer) -> None:
    from sparsegrad.models.loading import load_tokenizer

    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(build(conf("experiment=table6", "model.source=./none")).model)


def test_damaged_or_missing_weights_in_a_folder_are_named(conf: Composer, tmp_path: Path) -> None:
    from sparsegrad.models.loading import load_model, load_tokenizer

    config = build(conf("experiment=table6", f"model.source={tmp_path}"))
    with pytest.raises(UserError, match="holds neither model nor tokenizer"):
        load_tokenizer(config.model)
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read: .*no file named model\.safetensors"):
        load_model(config.model, config.task, None)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"model folder .* cannot be read"):
        load_model(config.model, config.task, None)


def test_llama_calibrates_in_bfloat16_with_float32_sums() -> None:
    from sparsegrad import calibrate
    from sparsegrad.targets import find_mlp

    model = tiny_llama(torch.bfloat16)
    ids = torch.randint(0, 40, (2, 8))
    linears = {kind: list(found.values()) for kind, found in find_mlp(model).items()}
    bases = calibrate(model, [{"input_ids": ids, "labels": ids}], linears, steps=1, gram_device="cpu")
    U = bases["up"].in_basis
    assert U is not None
    assert U.dtype == torch.float32
    assert torch.allclose(U.T @ U, torch.eye(16), atol=1e-5)
