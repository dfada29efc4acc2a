"""`save_lora` on toy models: what the files hold, that B A is the change, the error of a truncation, and refusals.

Whether peft itself loads the files is tested in `tests/runs/test_save_lora_peft.py`.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_checks import BATCHES, blocks, fast, train
from model_states import bits, has_bits
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_bert import INNER, WIDTH, toy_bert
from toy_models import toy_model

from sparsegrad import UserError, prepare, save_lora, to_linears
from sparsegrad.adapter.lora_files import CONFIG, TENSORS
from sparsegrad.adapter.lora_layout import shorten_names

MLP = ("intermediate.dense", "layer.0.output.dense", "layer.1.output.dense")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def apply_lora(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of `base` with the adapter merged, by what peft's documentation says about the files."""
    model, tensors = copy.deepcopy(base), load_file(folder / TENSORS)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    found = config(folder)
    assert found["r"] == found["lora_alpha"]
    assert found["rank_pattern"] == found["alpha_pattern"], "scaling 1"
    with torch.no_grad():
        for name in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]:
            A, B = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
            patterns = [rank for key, rank in found["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", name)]
            assert A.shape[0] == B.shape[1] == (patterns or [found["r"]])[0]
            linear: Any = model.get_submodule(name)
            linear.weight += (A.T @ B.T if found["fan_in_fan_out"] else B @ A).to(linear.weight.dtype)
            if found.get("lora_bias"):
                linear.bias += tensors.pop(f"{name}.lora_B.bias").to(linear.bias.dtype)
    state = model.state_dict()
    assert set(tensors) <= set(state)
    model.load_state_dict({**state, **tensors})
    return model


def check_equal(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=tolerance)


def perturbed(base: nn.Module, *names: str, scale: float = 0.1) -> Any:
    """A copy of `base` with random changes of the parameters whose name contains one of `names`."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not names or any(part in name for part in names):
                parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model


@pytest.mark.parametrize("train_rest", [True, False])
def test_fast_is_exact_without_a_rank(train_rest: bool, tmp_path: Path) -> None:
    base = toy_bert()
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_rest or name.endswith(tuple(f"{end}.weight" for end in MLP)))
    train(model, fast(model))
    saved = save_lora(model, tmp_path, base)  # the last step is not merged yet
    assert len(blocks(model)) == 4, "the layers are back in the model"
    # sqrt(0.1) of the sides 16 and 32: cores (10, 5) and (5, 10)
    assert dict(saved.ranks) == {
        f"bert.encoder.layer.{i}.{end}.dense": 5 for i in (0, 1) for end in ("intermediate", "output")
    }
    assert max(saved.errors.values()) < 1e-5
    assert config(tmp_path)["target_modules"] == sorted(MLP)
    assert saved.bias == bool(saved.whole) == train_rest
    assert saved.obstacles == (("modules_to_save", "lora_bias") if train_rest else ())
    check_equal(apply_lora(base, tmp_path), to_linears(model))


def test_fast_trains_on_after_saving(tmp_path: Path) -> None:
    base = toy_bert()
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    optimizer, unsaved = fast(model), fast(other)
    train(model, optimizer, BATCHES[:3])
    save_lora(model, tmp_path, base)
    train(model, optimizer, BATCHES[3:])
    train(other, unsaved)
    assert has_bits(to_linears(model), bits(to_linears(other)))


def test_fast_with_a_rank_truncates_what_is_outside_the_cores(tmp_path: Path) -> None:
    base = toy_bert()
    model = copy.deepcopy(base)
    train(model, fast(model))
    saved = save_lora(model, tmp_path, base, rank=WIDTH)
    assert saved.ranks["bert.encoder.layer.0.attention.query"] == WIDTH
    assert saved.ranks["bert.encoder.layer.0.intermediate.dense"] == 5
    assert "rank_pattern" in saved.obstacles
    check_equal(apply_lora(base, tmp_path), to_linears(model))


def test_fast_in_bfloat16_states_what_rounding_costs(tmp_path: Path) -> None:
    base = toy_bert().bfloat16()
    model = copy.deepcopy(base)
    train(model, fast(model))
    saved = save_lora(model, tmp_path, base)
    assert 1e-4 < max(saved.errors.values()) < 1
    check_equal(apply_lora(base, tmp_path), to_linears(model), 0.02)


@pytest.mark.parametrize("rank", [1, 5, WIDTH])
def test_a_truncated_change_has_the_error_of_the_svd(rank: int, tmp_path: Path) -> None:
    base = toy_bert()
    model = perturbed(base, "dense.weight")
    saved = save_lora(model, tmp_path, base, rank=rank)
    merged = apply_lora(base, tmp_path)
    assert set(saved.ranks.values()) == {rank}
    for name, error in saved.errors.items():
        old, new, now = (one.get_submodule(name).weight.double() for one in (base, model, merged))
        values = torch.linalg.svdvals(new - old)
        best = values[rank:].norm() / values.norm()
        assert error == pytest.approx(float(best), abs=1e-6)
        assert float((new - now).norm() / values.norm()) == pytest.approx(error, abs=1e-6)
    if rank == WIDTH:
        check_equal(merged, model)


@pytest.mark.parametrize("max_error", [0.7, 0.1, 1e-6])
def test_max_error_takes_the_smallest_rank_of_each_weight(max_error: float, tmp_path: Path) -> None:
    base = toy_bert()
    model = perturbed(base, "dense.weight")
    saved = save_lora(model, tmp_path, base, max_error=max_error)
    assert max(saved.errors.values()) <= max_error
    apply_lora(base, tmp_path)
    for name, rank in saved.ranks.items():
        values = torch.linalg.svdvals((model.get_submodule(name).weight - base.get_submodule(name).weight).double())
        assert rank == 1 or float(values[rank - 1 :].norm() / values.norm()) > 0.98 * max_error
    assert (max_error == 0.7) == (max(saved.ranks.values()) < WIDTH)


def test_a_run_of_the_exact_engine_at_full_rank(tmp_path: Path) -> None:
    base = toy_bert()
    model = copy.deepcopy(base)
    train(model, prepare(model, BATCHES, lr=1e-2, calibration_steps=3, density=0.1))
    saved = save_lora(model, tmp_path, base, rank=WIDTH, target_modules=list(MLP))
    assert len(saved.ranks) == 4
    assert "bert.encoder.layer.0.attention.query" in saved.whole, "only the named linears are truncated"
    check_equal(apply_lora(base, tmp_path), model)


def test_the_matrices_are_balanced(tmp_path: Path) -> None:
    """So that a change of 1e-4 does not underflow in float16, as servers use it."""
    base = toy_bert()
    save_lora(perturbed(base, "dense.weight", scale=1e-4), tmp_path, base, rank=3)
    tensors = load_file(tmp_path / TENSORS)
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        other = tensors[name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(tensors[name].norm(dim=1), other.norm(dim=0))


def test_conv1d_is_stored_as_a_linear(tmp_path: Path) -> None:
    base = toy_model("gpt2", torch.float32)
    model = perturbed(base, "mlp.c_fc", "norm")
    saved = save_lora(model, tmp_path, base, rank=WIDTH)
    assert config(tmp_path)["fan_in_fan_out"]
    assert saved.bias
    stored = load_file(tmp_path / TENSORS)["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"]
    assert stored.shape == (INNER, WIDTH)
    check_equal(apply_lora(base, tmp_path), model)


def test_linears_without_bias_beside_changed_biases_decide_who_is_stored_whole(tmp_path: Path) -> None:
    """peft has LoRA biases for all targets or for none."""
    base = toy_model("gpt2", torch.float32)
    model = perturbed(base, "mlp.c_fc", "q_proj")
    saved = save_lora(model, tmp_path, base, rank=4)
    assert list(saved.ranks) == [f"transformer.h.{i}.q_proj" for i in (0, 1)]
    assert saved.whole == tuple(f"transformer.h.{i}.mlp.c_fc" for i in (0, 1))
    with pytest.raises(UserError, match=r"c_fc\.bias changed, and .*q_proj has no bias.*save_adapter"):
        save_lora(model, tmp_path, base, rank=4, target_modules=["mlp.c_fc", "q_proj"])


def test_a_new_head_is_stored_whole(tmp_path: Path) -> None:
    base = toy_bert()
    model = perturbed(base)
    before = {name: tensor for name, tensor in base.state_dict().items() if "classifier" not in name}
    saved = save_lora(model, tmp_path, before, rank=2)
    assert "classifier" in saved.whole
    assert config(tmp_path)["base_model_name_or_path"] is None


def test_names_are_as_short_as_they_can_be() -> None:
    names = ["a.0.up", "a.1.up", "a.0.down", "b.down", "down.x", "up"]
    assert shorten_names(["a.0.down"], names) == ["a.0.down"]
    assert shorten_names(["a.0.down", "b.down"], names) == ["down"]
    assert shorten_names(["a.0.up", "a.1.up"], names) == ["a.0.up", "a.1.up"]
    assert shorten_names(["a.0.up", "a.1.up", "up"], names) == ["up"]
    with pytest.raises(UserError, match=r"cannot select up without a\.[01]\.up.* name both"):
        shorten_names(["up"], names)


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
            rf"rank={WIDTH + 1} .* at most {WIDTH}.*intermediate\.dense",
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


@pytest.mark.parametrize("failing", ["save_file", "write_json"])
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


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_between_two_renames_no_tensors_have_the_other_configuration(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toy_bert()
    save_lora(perturbed(base), tmp_path, base, rank=2)
    done, replace = [0], Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):  # only the renames of the two files, not those within write_json
            if done[0] == renames:
                raise KeyboardInterrupt
            done[0] += 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_lora(perturbed(base), tmp_path, base, rank=3)
    monkeypatch.undo()
    assert not (tmp_path / CONFIG).exists()
    save_lora(perturbed(base), tmp_path, base, rank=3)
    apply_lora(base, tmp_path)


def test_the_tensors_are_float32_or_wider(tmp_path: Path) -> None:
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        base = toy_bert().to(dtype)
        save_lora(perturbed(base, "intermediate.dense.weight"), tmp_path, base, rank=2)
        tensors: dict[str, Tensor] = load_file(tmp_path / TENSORS)
        assert {tensor.dtype for tensor in tensors.values()} == {stored}
