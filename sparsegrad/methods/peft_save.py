"""Write the adapter of a peft method in peft's own format, with the head and whatever else trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from sparsegrad.adapter.lora_files import write_lora

_PREFIX = "base_model."  # before the names of a tuner, in a PeftModel


def save_peft(model: nn.Module, tuner: BaseTuner, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads.

    Args:
        model: the trained model, with its adapters.
        tuner: what wraps it.
        folder: created if needed.

    Raises:
        UserError: when the folder cannot be written.
    """
    config = tuner.peft_config["default"]
    whole = find_whole_modules(model)
    tensors = {
        f"{_PREFIX}{name}": tensor.detach().clone().contiguous()
        for name, tensor in get_peft_model_state_dict(tuner, save_embedding_layers=False).items()
    }
    for name in whole:
        module = model.get_submodule(name)
        tensors |= {f"{_PREFIX}model.{name}.{part}": value.clone() for part, value in module.state_dict().items()}
    described = config.to_dict() | {"inference_mode": True, "modules_to_save": whole or None}
    described |= {"task_type": "SEQ_CLS" if hasattr(model, "num_labels") and whole else None}
    described["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None)
    write_lora(folder, {name: _plain(value) for name, value in described.items()}, tensors)


def find_whole_modules(model: nn.Module) -> list[str]:
    """The largest modules outside the adapters of which every parameter trains, such as a head."""
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        inside = name.startswith(tuple(f"{one}." for one in found)) or f"{name}.".startswith(wrapped or ("\0",))
        if name and parameters and not inside and all(one.requires_grad for one in parameters):
            found.append(name)
    return found


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON has it."""
    if isinstance(value, set | tuple):
        return sorted(value)
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return getattr(value, "value", value)
