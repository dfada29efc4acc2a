"""Whether a model is of the kind that a task trains, as its configuration says before anything large is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsegrad.assets.hub import fetch_files
from sparsegrad.distributed import on_main
from sparsegrad.errors import UserError
from sparsegrad.models.config import ModelConfig
from sparsegrad.models.source import Source, Sources, find_sources
from sparsegrad.tasks.base import Task

_FIELDS = "config.json"


def find_suitable_sources(config: ModelConfig, task: Task) -> Sources:
    """The sources of a model and its tokenizer, as `find_sources`, of a model that the task can train.

    An asset that is not there counts as what its YAML says: nobody should fetch a model that does not suit.

    Raises:
        UserError: for a model that does not suit, or as `find_sources`.
    """
    try:
        sources = find_sources(config, is_language=task.is_language)
    except UserError:
        if config.source == f"asset:{config.name}":  # for another source, the YAML does not say what it is
            check_suitable(config, task, config.architecture)
        raise
    check_suitable(config, task, config.architecture if sources.model is None else _read_fields(sources.model))
    return sources


@on_main
def _read_fields(source: Source) -> Mapping[str, Any]:
    folder = source.folder
    if source.repository is not None and _FIELDS in source.repository.files:
        folder = fetch_files(replace(source.repository, files=(_FIELDS,), size=0), is_whole=False)
    try:
        found = json.loads((folder / _FIELDS).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):  # loading says what is wrong with it
        return {}
    return found if isinstance(found, Mapping) else {}


def check_suitable(config: ModelConfig, task: Task, fields: Mapping[str, Any]) -> None:
    """Refuse a model that is of another kind than the task trains.

    `transformers` gives an encoder a language head too, but its tokens see what they should predict.

    Args:
        config: the model.
        task: what it shall be trained on.
        fields: of its configuration in `transformers`; none are no reason to refuse.

    Raises:
        UserError: for an encoder and a language task, or a model that has no class in `transformers` for the task.
    """
    from transformers.models.auto import modeling_auto as known

    kind, is_own = fields.get("model_type"), "auto_map" in fields  # `auto_map`: it brings its own code
    what = f"model={config.name} ({kind}, from {config.source})"
    if not isinstance(kind, str) or kind not in known.MODEL_MAPPING_NAMES:
        return
    if not task.is_language:
        if kind not in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not is_own:
            raise UserError(
                f"task={task.name} needs a classifier, and {what} cannot be one in transformers: choose a model "
                "with a ...ForSequenceClassification, such as those of model=minilm and model=roberta_base"
            )
        return
    if kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not fields.get("is_decoder", False):
        why = "sees both ways"
    elif kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_own:
        why = "is none"
    else:
        return
    raise UserError(
        f"task={task.name} needs a causal language model, and {what} {why}: choose a decoder, such as those of "
        "model=smollm2 and model=llama2_7b"
    )
