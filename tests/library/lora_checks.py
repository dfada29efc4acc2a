"""What tests of `save_lora` share: changed models, and the adapter applied by the rules of its format."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sparsegrad.adapter.lora_files import CONFIG, TENSORS

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
