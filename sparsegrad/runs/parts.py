"""The parts of one run that training needs: tokenizer, model, its MLP linears, tokenized rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from sparsegrad.models.layer_choice import dense_weights, find_linears, select_linears
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.models.pooling import set_pooling
from sparsegrad.models.source import Sources
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.memory_estimate import check_memory
from sparsegrad.runs.model_checks import check_lists, check_model_and_tokenizer, check_positions, check_tokenizer
from sparsegrad.runs.tokenized_splits import TokenSets, log_counts, token_sets
from sparsegrad.targets import Linears, all_linears
from sparsegrad.tasks.base import Splits


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one run trains, and on what.

    Attributes:
        model: on its device, as it was loaded.
        tokenizer: the model's.
        linears: the MLP linears whose weights the method trains.
        dense: names of MLP weights beside them that train densely, whatever the method.
        sets: tokenized rows.
        size: parameters of the model before a method changes it.
        mlp_size: those among them in the weights of `linears`.
    """

    model: nn.Module
    tokenizer: Any
    linears: Linears
    dense: frozenset[str]
    sets: TokenSets
    size: int
    mlp_size: int


def load_parts(config: RunConfig, splits: Splits, sources: Sources, device: torch.device) -> Parts:
    """Load everything that training needs, and check what could not be checked without it.

    Raises:
        UserError: when the model cannot be had, does not fit its tokenizer, has not the named linears, does not suit
            the method, or does not fit into the device's memory.
    """
    set_seed(config.seed)  # before the model: heads and adapters are drawn from it
    check_lists(config.model)
    tokenizer = load_tokenizer(config.model, sources.tokenizer)
    check_tokenizer(config, tokenizer)
    dtype = torch.bfloat16 if config.train.precision == "bf16_weights" else torch.float32
    model = load_model(config.model, config.task, tokenizer, dtype, sources.model)
    check_model_and_tokenizer(config, model, tokenizer)
    if not config.task.is_language:
        set_pooling(model, config.model.pooling)
    found, chosen = find_linears(model, config.model.mlp), config.model
    linears = select_linears(found, chosen.kinds, chosen.blocks)
    dense = dense_weights(found, chosen.dense, chosen.blocks, linears)
    config.method.check(linears)
    size = sum(parameter.numel() for parameter in model.parameters())
    sets = token_sets(config, splits, tokenizer)
    check_positions(config, model, sets)
    if config.task.is_language:
        log_counts(splits.counts, sets.counts)
        if config.train.parallel == "ddp":  # the estimate is of a process that has the whole model
            check_memory(config, model, linears, device)
    mlp_size = sum(linear.weight.numel() for linear in all_linears(linears))
    model = model.to(device if config.train.parallel == "ddp" else "cpu")
    return Parts(
        model=model, tokenizer=tokenizer, linears=linears, dense=dense, sets=sets, size=size, mlp_size=mlp_size
    )
