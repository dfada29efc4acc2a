"""`save_lora` on toy models: what the files hold, that B A is the change, and the error of a truncation.

Whether peft itself loads the files is tested in `tests/runs/test_save_lora_peft.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from fast_checks import BATCHES, blocks, fast, train
from lora_checks import MLP, apply_lora, check_equal, config, perturbed
from model_states import bits, has_bits
from safetensors.torch import load_file
from torch import Tensor
from toy_bert import INNER, WIDTH, toy_bert
from toy_models import toy_model

from sparsegrad import UserError, prepare, save_lora, to_linears
from sparsegrad.adapter.lora_files import TENSORS
from sparsegrad.adapter.lora_layout import shorten_names


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
    assert list(saved.ranks) == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]
    assert saved.whole == tuple(f"transformer.h.{i}.q_proj" for i in (0, 1)), "the smaller ones"
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


def test_the_tensors_are_float32_or_wider(tmp_path: Path) -> None:
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        base = toy_bert().to(dtype)
        save_lora(perturbed(base, "intermediate.dense.weight"), tmp_path, base, rank=2)
        tensors: dict[str, Tensor] = load_file(tmp_path / TENSORS)
        assert {tensor.dtype for tensor in tensors.values()} == {stored}
