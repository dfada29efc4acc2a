"""Write the adapter of a peft method in peft's own format, with the head and whatever else trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from sparsegrad.adapter.lora_files import write_lora
from sparsegrad.adapter.lora_layout import CONTAINERS

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
    whole, _ = find_trained(model)
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


def find_trained(model: nn.Module) -> tuple[list[str], str | None]:
    """What trains outside the adapters: the modules that are stored whole, and the first parameter that cannot be.

    The modules, none inside another and in the model's order, are the largest ones of which every parameter trains,
    such as a head, and those of which an own one does. A parameter that none of them holds (else None) belongs to the
    model itself, to a list of parameters, to a module that has adapters inside, or to a linear that an adapter wraps,
    as its bias.
    """
    wrapped = _list_wrapped(model)
    whole: list[str] = []
    for name, module in model.named_modules():
        is_inside = f"{name}.".startswith((*wrapped, *(f"{one}." for one in whole)))
        if name and not is_inside and _trains_whole(module):
            whole.append(name)
    held = (*wrapped, *(f"{one}." for one in whole if not any(inner.startswith(f"{one}.") for inner in wrapped)))
    trained = (name for name, one in model.named_parameters() if one.requires_grad)
    uncovered = (one for one in trained if not one.startswith(held) or one.endswith(".base_layer.bias"))
    return whole, next(uncovered, None)


def _trains_whole(module: nn.Module) -> bool:
    """Whether all parameters of a module train, or an own one, so that peft stores the module whole."""
    if isinstance(module, CONTAINERS):
        return False
    trains = [one.requires_grad for one in module.parameters()]
    return (bool(trains) and all(trains)) or any(one.requires_grad for one in module.parameters(recurse=False))


def _list_wrapped(model: nn.Module) -> tuple[str, ...]:
    """Names of the linears that adapters wrap, each with a dot."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON has it."""
    if isinstance(value, set | tuple):
        return sorted(value)
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return getattr(value, "value", value)
