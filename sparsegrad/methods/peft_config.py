"""Settings of a peft method, checked by peft's own configuration class, and its adapters put into a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sparsegrad.errors import UserError, did_you_mean, fail, first_line
from sparsegrad.methods.peft_fields import check_types

# With ++, which also works for a model whose YAML names neither.
_WHERE = "model.mlp chooses the weights, and ++model.kinds=[...] and ++model.blocks=[...] some of them"
# Fields that the run sets, with what sets them.
_OURS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "target_parameters", "modules_to_save"), _WHERE),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices"), _WHERE),
    "bias": "train.train_rest decides whether biases train",
    "alora_invocation_tokens": "peft finds the tokens in hooks of its PeftModel; without them nothing would train",
    "use_asa": "it prunes by calls of its own after each step",  # of AdaMSS
    "generator_seed": "the run seeds all draws of the training",  # of PVeRA
    **dict.fromkeys(
        ("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
         "fan_in_fan_out", "runtime_config", "megatron_config", "megatron_core"),
        "the run sets it",
    ),
}  # fmt: skip
_SHARES = "its layers share what trains, which a checkpoint of transformers cannot hold"
# Types that do not train linears, or need more than a model and an optimizer.
_ELSEWHERE = {
    "ADALORA": "it changes its ranks by calls of its own after each step",
    "ADAPTION_PROMPT": "it trains prompts in the attention",
    "LN_TUNING": "it trains norms; method=bitfit is the nearest here",
    "POLY": "it needs the number of a task with each row",
    "SHADOW": "it trains a second model beside the first",
    "TRAINABLE_TOKENS": "it trains embeddings",
    **dict.fromkeys(("LILY", "TINYLORA", "UNILORA", "VBLORA"), _SHARES),
    "XLORA": "it mixes adapters that are trained already",
}
# Types that multiply their trained factors, which are float32, with frozen ones of the weights' precision.
_ONE_PRECISION = ("OSF",)
# Version of peft in which a type for linears appeared, read off its releases, for the message where the installed one
# lacks it. Those of 0.18, the oldest that this project supports, are left out.
_SINCE = {
    **dict.fromkeys(("ADAMSS", "GRALORA", "PEANUT", "PSOFT", "PVERA", "lora_ga"), "0.19"),
    **dict.fromkeys(("BEFT", "DEFT", "FROD", "GLORA", "HIRA"), "0.20"),
    "SUPERTUNING": "0.21",
}
# Initialisations of a LoRA that read batches. For `lora_ga`, this project hands in its calibration batches.
FROM_DATA = "lora_ga"
_DATA_ELSEWHERE = {
    "eva": "peft's EVA brings a loop of its own",
    "corda": "peft's CorDA reads one row at a time, in one process",
}
# peft's fields for the seed of what a method draws once, such as its projections or entries.
_SEEDS = ("projection_prng_key", "random_loc_seed", "random_seed")


def list_types() -> list[str]:
    """The types of the installed peft that train linears."""
    names = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if kind.value not in _ELSEWHERE}
    return sorted(name for name, tuner in names.items() if isinstance(tuner, type) and issubclass(tuner, BaseTuner))


def find_config_class(node: Mapping[str, Any]) -> type[Any]:
    """peft's configuration class for `peft_type`, which has all fields of `node`.

    Raises:
        UserError: for a type that is unknown, too new for the installed peft or not for linears; or for an unknown
            field, or a value of another type than its field.
    """
    kind, known = str(node.get("peft_type")).upper(), list_types()
    where = "method.config.peft_type"
    if kind not in known:
        if kind in _ELSEWHERE:
            raise fail(where, kind, _ELSEWHERE[kind], f"choose one of {', '.join(known)}")
        if kind in _SINCE:
            raise _too_new(where, kind)
        if any(one.value == kind for one in PEFT_TYPE_TO_CONFIG_MAPPING):
            raise fail(where, kind, "it trains prompts, not linears", f"choose one of {', '.join(known)}")
        raise fail(where, node.get("peft_type"), f"choose one of {', '.join(known)}", did_you_mean(kind, known))
    found: type[Any] = next(value for one, value in PEFT_TYPE_TO_CONFIG_MAPPING.items() if one.value == kind)
    fields = [field.name for field in dataclasses.fields(found) if field.init]
    _check_fields(kind, node, fields)
    check_types(found, {name: value for name, value in node.items() if name != "peft_type"})
    _check_init(node.get("init_lora_weights"), fields)
    return found


def _too_new(where: str, name: str) -> UserError:
    return UserError(
        f"{where}={name} is not in peft {peft.__version__}: it came with peft {_SINCE[name]}; "
        f"run pip install -U 'peft>={_SINCE[name]}'"
    )


def _check_init(init: Any, fields: Sequence[str]) -> None:
    where = "method.config.init_lora_weights"
    if init in _DATA_ELSEWHERE:
        raise fail(where, init, _DATA_ELSEWHERE[init], "use lora_ga")
    if init == FROM_DATA and "lora_ga_config" not in fields:
        raise _too_new(where, init)


def _check_fields(kind: str, node: Mapping[str, Any], fields: Sequence[str]) -> None:
    allowed = sorted(set(fields) - {*_OURS, "peft_type"})
    for name, value in node.items():
        if name in _OURS:
            raise fail(f"method.config.{name}", value, _OURS[name], "leave it out")
        if name not in (*allowed, "peft_type"):
            about = f"{kind} of peft {peft.__version__} has no such field; it has {', '.join(allowed)}"
            raise fail(
                f"method.config.{name}",
                value,
                about,
                "did you mean r?" if name == "rank" and "r" in allowed else did_you_mean(name, allowed),
            )


def make_config(node: Mapping[str, Any], targets: Mapping[str, tuple[int, int]]) -> Any:
    """peft's configuration for linears, name -> shape (out, in).

    Raises:
        UserError: for a value that peft's class refuses, in its words.
    """
    kind, config_class = str(node["peft_type"]).upper(), find_config_class(node)
    given = {name: value for name, value in node.items() if name != "peft_type"}
    if kind == "IA3":
        # As in its paper, the factors of an MLP's output linear are on its inputs: it has more inputs than outputs.
        wide = [name for name, (rows, columns) in targets.items() if columns > rows]
        given = {"feedforward_modules": wide, **given}
    if given.get("init_lora_weights") == "lora_ga":
        given = {"lora_ga_config": {}, **given}  # its defaults; without it peft does not start
    if "save_projection" in (field.name for field in dataclasses.fields(config_class)):
        # All layers share the frozen projections, which transformers refuses in a checkpoint: they are drawn again.
        given = {"save_projection": False, **given}
    with quiet():
        return _call_peft(kind, lambda: config_class(target_modules=list(targets), **given))


def check_dtype(node: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise `UserError` if the type cannot train beside weights of `dtype`."""
    kind = str(node["peft_type"]).upper()
    if kind in _ONE_PRECISION and dtype in (torch.bfloat16, torch.float16):
        about = f"its trained factors are float32, which peft cannot multiply with weights in {dtype}"
        raise fail("method.config.peft_type", kind, about, "set train.precision=bf16 or fp32")


def add_seed(node: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """`node` with `seed` in peft's field for it, if the type has one and `node` does not set it."""
    fields = {field.name for field in dataclasses.fields(find_config_class(node))}
    return {**({} if seed is None else dict.fromkeys(fields.intersection(_SEEDS), seed)), **node}


def check_apart(tuner: BaseTuner) -> None:
    """Raise `UserError` if two linears share a tensor that a checkpoint would have to hold."""
    owners: dict[int, str] = {}
    for name, layer in tuner.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for tensor in layer.state_dict(keep_vars=True).values():
                if owners.setdefault(id(tensor), name) != name:
                    raise fail("method.config.peft_type", tuner.peft_config["default"].peft_type.value, _SHARES)


def wrap(model: nn.Module, config: Any) -> BaseTuner:
    """Put the adapters of `config` into `model`, in place.

    Unlike `inject_adapter_in_model` this takes methods whose layers share tensors, such as VeRA: the tuner, which
    holds them, is returned.

    Raises:
        UserError: if peft cannot wrap these linears with these settings, in its words.
    """
    kind = config.peft_type.value
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    with quiet():
        return _call_peft(kind, lambda: tuner(model, config, adapter_name="default"))


def _call_peft(kind: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # peft and its methods raise every type there is
        raise UserError(
            f"method.config: peft {peft.__version__} refuses these settings of {kind}: {first_line(error)}"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's warnings on settings that are right here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
