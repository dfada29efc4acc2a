"""A run's method made ready: what it may ask of the run, and the store of its bases."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from sparsegrad.distributed import world_size
from sparsegrad.errors import UserError, fail
from sparsegrad.methods.base import Context, Prepared, freeze
from sparsegrad.models.loading import describe_tokenizer
from sparsegrad.models.source import Sources
from sparsegrad.optim.rest import outside, set_rest_rate
from sparsegrad.runs.basis_cache import BasisStore
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.lora_check import check_outline, make_outline
from sparsegrad.runs.parts import Parts
from sparsegrad.runs.trainer_setup import training_batches
from sparsegrad.tasks.base import Splits
from sparsegrad.trainer.bfloat16 import fast_bfloat16
from sparsegrad.trainer.parallel import shard_model


def prepare_method(
    config: RunConfig, parts: Parts, splits: Splits, sources: Sources, device: torch.device, *, resuming: bool
) -> Prepared:
    """Let the method change the model into what trains, calibration included."""
    model: Any = parts.model
    outline = make_outline(model) if config.save_adapter == "lora" else None
    model.train()
    if config.train.gradient_checkpointing:  # the calibration needs it as much as the training
        model.gradient_checkpointing_enable({"use_reentrant": False})
    context = _make_context(config, parts, _basis_store(config, parts, splits, sources, resuming))
    if config.train.parallel == "fsdp2":
        # What trains becomes float32, which is not possible in a shard.
        freeze(model, parts.linears, context, mlp_weights=True)
        shard_model(model, device)
    # Weights of two precisions in one model need autocast, in the calibration too.
    mixed = _calibrates_mixed(config)
    rest = _find_rest(config, parts, context)
    fast = fast_bfloat16(device) if config.multiplies_bfloat16 else nullcontext()
    before = [] if outline is None else list(model.named_parameters(remove_duplicate=False))
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed), fast:
        prepared = config.method.prepare(model, parts.linears, context)
    _check_saving(config, parts, prepared)
    if outline is not None:
        check_outline(config, parts, prepared, outline, before)
    if config.train.rest_lr is not None:
        set_rest_rate(prepared.optimizer, rest, config.train.rest_lr)
    return prepared


def _find_rest(config: RunConfig, parts: Parts, context: Context) -> set[int]:
    """The parameters that train at `train.rest_lr`, by identity: those outside the MLP weights.

    Of a method that chooses them itself, such as BitFit, only the head: the others are what the method trains.
    """
    model: Any = parts.model
    if not getattr(config.method, "chooses_rest", False):
        return outside(model, parts.linears)
    return {id(parameter) for name, parameter in model.named_parameters() if context.is_head(name)}


def _check_saving(config: RunConfig, parts: Parts, prepared: Prepared) -> None:
    """What shall be saved at the end can be; known now, before the training."""
    merges = prepared.notes.get("merges", True)
    if config.save_adapter == "peft" and prepared.save is None:
        why = _explain_unsaved(config, parts)
        raise fail("save_adapter", "peft", why, "use save_adapter=lora" if merges else _suggest_unmerged(config))
    if not merges and (config.save_model or config.save_adapter in ("lora", "sparsegrad")):
        name = "save_model=true" if config.save_model else f"save_adapter={config.save_adapter}"
        remedy = "use save_adapter=peft" if prepared.save is not None else _suggest_unmerged(config)
        raise UserError(
            f"{name} is not allowed: peft cannot merge method={config.method.name} into the weights; {remedy}"
        )


def _explain_unsaved(config: RunConfig, parts: Parts) -> str:
    """Why peft's format cannot hold what trains; `check_saving` has refused the other reasons."""
    from sparsegrad.methods.peft_save import find_trained  # imports peft, which the method has done here

    if (name := find_trained(parts.model)[1]) is not None:
        return f"peft can store {name}, which trains, neither in the adapter nor in modules_to_save"
    return (
        f"the initialisation of method={config.method.name} changes W, so that its adapter does not fit the model as "
        "published"
    )


def _suggest_unmerged(config: RunConfig) -> str:
    """How to save a method that cannot be merged, where its adapter does not hold all that trains."""
    if config.train.train_rest:
        return "set train.train_rest=false and save_adapter=peft, or save nothing"
    return "save nothing (save_adapter=null save_model=false)"


def _make_context(config: RunConfig, parts: Parts, store: BasisStore) -> Context:
    has_head = not config.task.is_language
    return Context(
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
        train_rest=config.train.train_rest,
        is_head=lambda name: name in parts.dense or (has_head and config.model.is_head(name)),
        has_head=has_head,
        batches=lambda: training_batches(parts.sets.train, config, parts.tokenizer),
        calibrated=store.calibrated,
        measure=store.measure,
        accumulation=config.train.grad_accumulation,
    )


def _calibrates_mixed(config: RunConfig) -> bool:
    """Whether the calibration runs under autocast; with precision `bf16` only the training does."""
    return config.train.precision == "bf16_weights"


def _basis_store(config: RunConfig, parts: Parts, splits: Splits, sources: Sources, resuming: bool) -> BasisStore:
    """The store of bases, with all that a calibration's gradients depend on besides the weights."""
    model: Any = parts.model
    machine_dependent = ("transformers_version", "_name_or_path")  # the same architecture on any machine
    architecture = {name: value for name, value in model.config.to_dict().items() if name not in machine_dependent}
    facts = {
        "linears": {kind: list(found) for kind, found in parts.linears.items()},
        "architecture": architecture,
        "vocabulary": describe_tokenizer(parts.tokenizer),
        "data": splits.fingerprint,
        "protocol": config.protocol.select,
        "seed": config.seed,
        "batch_size": config.train.batch_size * world_size(),
        "pad": config.data.pad,
        "max_length": config.data.max_length,
        **config.task.token_facts,
        **_unusual_facts(config, sources),
    }
    return BasisStore(
        folder=Path(config.work_dir) / "bases",
        model=model,
        facts=facts,
        own=config.checkpoints / "bases.safetensors",
        resuming=resuming,
    )


def _unusual_facts(config: RunConfig, sources: Sources) -> dict[str, Any]:
    """Facts of settings that most runs leave as they are: left out there, so that stored bases keep their names."""
    model, columns = config.model, list(config.task.columns)
    facts: dict[str, Any] = {}
    if model.pooling is not None:
        facts["pooling"] = model.pooling
    if _calibrates_mixed(config):
        facts["precision"] = config.train.precision
    if columns != sorted(columns):  # in this order a pair of texts is read; the data's fingerprint sorts them
        facts["columns"] = columns
    # Another tokenizer may share the vocabulary, another template of it makes other tokens; code computes.
    if model.tokenizer is not None or model.trust_remote_code or getattr(config.task, "format", None) == "chat":
        facts["source"] = sources.as_json()
    if config.task.is_language and world_size() > 1:  # whose loss is a mean over the tokens of each process
        facts["processes"] = world_size()
    return facts
