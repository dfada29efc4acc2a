"""The benchmark's arms and settings: what is measured where and on which batches, and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmark import CPU, SETTING

from experiments.bench import __main__ as benchmark
from experiments.bench import machine
from experiments.bench.arms import ARMS, REFERENCES, arms_of, list_ready, lora_rank
from experiments.bench.lengths import batch_lengths
from experiments.bench.measure import batches, measure_arm, prepare_loop, prepare_model
from experiments.bench.presets import plan
from experiments.bench.settings import Setting


def test_the_arms_are_those_of_the_comparison_and_every_one_can_be_made() -> None:
    assert {
        "frozen", "full", "lora_peft", "lora_dtype", "lora_fused", "meprop", "layer_regular", "layer_sparse_dense",
        "authors", "exact", "fast",
    } <= set(ARMS)  # fmt: skip
    assert set(REFERENCES) <= set(ARMS)
    for arm in ARMS.values():
        assert arm.make(Setting(shape="mlp_768", padding="none")).prepare


def test_every_option_of_conf_method_is_an_arm_at_the_density_of_the_setting() -> None:
    ready = list_ready()
    assert {"bitfit", "lora_sb", "random_mask", "sparsegrad_static", "peft/dora", "peft/lora_ga"} <= set(ready)
    setting = Setting(shape="mlp_768", padding="none", density=0.02)
    names = ("random_mask", "sparsegrad_authors", "lora_authors", "peft/dora", "peft/ia3")
    made: dict[str, Any] = {name: ready[name].make(setting) for name in names}
    assert (made["random_mask"].density, made["random_mask"].choice) == (0.02, "random")
    assert (made["sparsegrad_authors"].density, made["sparsegrad_authors"].keep) == (0.02, None)
    assert made["lora_authors"].rank == lora_rank(setting)
    assert made["peft/dora"].budget == "density:0.02"
    assert made["peft/ia3"].budget is None


@pytest.mark.parametrize("arm", ["peft/lora_ga", "peft/ia3", "lora_sb", "static_mask", "bitfit"])
def test_an_arm_that_calibrates_itself_is_measured_on_the_batches_of_all(arm: str) -> None:
    source = batches(SETTING, CPU, 0, 4)
    first = next(batches(SETTING, CPU, 0, 4))["inputs"]
    loop = prepare_loop(SETTING, arm, prepare_model(SETTING, CPU, 0), source, CPU, dict)
    assert torch.equal(next(loop.source)["inputs"], first)
    loop.step()
    assert loop.counts["trainable"] > 0


def test_an_option_of_conf_method_is_measured_in_every_chosen_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--arms", "peft/dora,full", "--shape", "mlp_tiny", "--list"]) == 0
    assert ": full, peft/dora" in capsys.readouterr().out


def test_lora_has_as_many_entries_as_are_kept() -> None:
    setting = Setting(shape="roberta_base", task="cola")
    kept = 0.01 * 768 * 3072
    assert abs(lora_rank(setting) * (768 + 3072) - kept) <= (768 + 3072) / 2


def test_an_arm_that_differs_only_in_bf16_or_with_padding_is_measured_there_only() -> None:
    assert "lora_dtype" not in arms_of(SETTING, ())
    assert "lora_dtype" in arms_of(replace(SETTING, precision="bf16"), ())
    assert "exact_drop" not in arms_of(SETTING, ())
    assert arms_of(SETTING, ("fast", "full")) == ["full", "fast"]


def test_no_two_planned_settings_are_the_same() -> None:
    planned = plan(CPU, quick=False)
    keys = [found.setting.key for found in planned]
    assert len(set(keys)) == len(keys)
    assert {found.preset for found in planned} >= {"core", "paper", "model", "tokens", "width", "llama"}


def test_the_plan_for_a_gpu_has_its_precisions_and_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "gpu_memory_gib", lambda device: 80.0)
    planned = plan(torch.device("cuda"), quick=False)
    settings = [found.setting for found in planned]
    assert {s.precision for s in settings} == {"fp32", "tf32", "bf16_autocast", "bf16"}
    assert {s.shape for s in settings} >= {"bert_base", "roberta_base", "roberta_large", "minilm", "llama_2_7b"}
    assert {s.batch for s in settings if s.shape == "bert_base"} == {8, 16, 32}
    assert all(s.blocks is None for s in settings if s.shape == "roberta_base")
    assert len({s.key for s in settings}) == len(settings)
    monkeypatch.setattr(machine, "gpu_memory_gib", lambda device: 8.0)
    assert "llama_2_7b" not in {found.setting.shape for found in plan(torch.device("cuda"), quick=False)}


def test_every_arm_gets_the_same_batches_padded_as_asked() -> None:
    longest = Setting(shape="minilm", padding="longest", task="mrpc", batch=4)
    first, second = (list(_take(batches(longest, CPU, 3, 5), 5)) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert all(batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] for batch in first)
    for padding in ("longest", "max_length"):  # the first arm of a setting asks for more than the others
        lengths = [batch_lengths("mrpc", 4, 128, padding, count, 3) for count in (120, 5)]
        assert lengths[0][:5] == lengths[1]
    padded = next(batches(replace(longest, padding="max_length"), CPU, 3, 1))
    assert padded["input_ids"].shape == (4, 128)
    assert (padded["attention_mask"].sum(1) < 128).any()


def _take(source: Any, count: int) -> Any:
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arms", "peft/dor,full"], "arm=peft/dor is not allowed: choose one of frozen, full"),
        (["--shape", "bert"], "shape=bert is not allowed: choose one of bert_base"),
        (["--shape", "bert_base", "--precision", "tf32", "--device", "cpu"], "fp32"),
        (["--shape", "bert_base", "--precision", "fp8"], "choose one of fp32, tf32"),
        (["--shape", "bert_base", "--blocks", "13"], "from 1 to 12"),
        (["--shape", "mlp_768", "--padding", "longest"], "give none"),
        (["--shape", "minilm", "--task", "qnli"], "choose one of cola"),
        (["--batch", "8"], "--batch belongs to --shape"),
        (["--presets", "all"], "choose one of core"),
        (["--repeats", "0"], "of at least 1"),
        (["--minutes", "-1"], "above 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    assert benchmark.main([*arguments, "--out", str(out), "--list"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not out.exists()


def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert benchmark.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_weights_in_bf16_are_measured() -> None:
    """What trains is float32, so the step needs autocast."""
    setting = replace(SETTING, precision="bf16").as_json()
    cell = measure_arm(setting, "full", "cpu", "", seed=0, warmup=2, steps=3, seconds=None)
    assert cell["steps"] == 3
