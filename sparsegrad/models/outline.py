"""The outline of a model: its modules and shapes without weights, to plan with before anything large is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError, first_line
from sparsegrad.models.config import ModelConfig
from sparsegrad.models.source import find_sources
from sparsegrad.tasks.base import Task


def load_outline(config: ModelConfig, task: Task, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model for `task` on the `meta` device, from its configuration alone.

    Args:
        config: the model.
        task: decides between a causal language model and a classifier.
        dtype: of the weights.

    Raises:
        UserError: if the source does not exist, or its configuration describes no model.
    """
    import transformers

    maker: Any = (
        transformers.AutoModelForCausalLM if task.is_language else transformers.AutoModelForSequenceClassification
    )
    try:
        with torch.device("meta"):
            model: nn.Module = maker.from_config(_read_architecture(config, task), dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # whatever a wrong field leads to
        raise UserError(f"model={config.name} has a configuration that makes no model: {first_line(error)}") from None
    return model


def _read_architecture(config: ModelConfig, task: Task) -> Any:
    from transformers import AutoConfig

    if config.weights == "random":
        return AutoConfig.for_model(**config.architecture)
    source = find_sources(config, is_language=task.is_language).model
    assert source is not None
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    return AutoConfig.from_pretrained(str(source.fetch()), **options)
