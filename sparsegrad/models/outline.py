"""The outline of a model: its modules and shapes without weights, to plan with before anything large is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError, first_line
from sparsegrad.models.config import ModelConfig
from sparsegrad.models.loading import choose_class, make_architecture, read_folder
from sparsegrad.models.source import find_source
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
    maker, options = choose_class(task), {"trust_remote_code": config.trust_remote_code, "dtype": dtype}
    try:
        architecture = _read_architecture(config)
        with torch.device("meta"):
            model: nn.Module = maker.from_config(architecture, **options)
    except UserError:
        raise
    except Exception as error:  # whatever a wrong field leads to
        raise UserError(
            f"model={config.name} has a configuration that makes no model ({first_line(error)}): correct its fields"
        ) from None
    return model


def _read_architecture(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    if config.weights == "random":
        return make_architecture(config, config.architecture)
    folder = Path(config.source).expanduser()
    if not folder.is_dir():  # for its configuration, the weights of a folder need not be hashed
        folder = find_source(config.source, config.revision, weights=False).fetch()
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    return read_folder(lambda: AutoConfig.from_pretrained(str(folder), **options), config.source)
