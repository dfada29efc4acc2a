"""Load a model with its tokenizer: from the hub, a folder, a fetched asset, or as random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sparsegrad.assets.download import asset_path
from sparsegrad.assets.hub import hub_answers
from sparsegrad.errors import UserError, check_choice, check_number, check_text, fail, first_line
from sparsegrad.runs.layer_choice import check_blocks
from sparsegrad.tasks.base import Task

ASSET = "asset:"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model, as its YAML in conf/model says.

    Attributes:
        name: what records and tables call it.
        source: hub id, local folder, or `asset:NAME`.
        weights: `pretrained`, or `random`: the architecture alone, which needs no hub.
        architecture: fields of the model's configuration, used with random weights.
        tokenizer: where the tokenizer comes from; null means from `source`.
        mlp: layer kind -> pattern of module names, or the name of a known layout (`sparsegrad.targets`).
        kinds: those of its layer kinds that are fine-tuned; null: all.
        dense: those of its layer kinds that train densely beside them, whatever the method; null: none.
        blocks: indices of the blocks whose MLP is fine-tuned, or a slice such as `0::3`; null: all.
        head: pattern of the parameters that are new for each task.
        lr: learning rate where none is given.
        lora_rank, authors_keep: the paper's rank of LoRA and the authors' kept entries per weight at this size.
        usual: what this model sets where conf/config.yaml and conf/method say `oc.select:model.usual...`.
    """

    name: str
    source: str
    mlp: Any
    head: str
    lr: float
    lora_rank: int
    authors_keep: int
    kinds: Any = None
    dense: Any = None
    blocks: Any = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "pretrained"
    tokenizer: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.weights", self.weights, ("pretrained", "random"))
        for name in ("name", "source", "head"):
            check_text(f"model.{name}", getattr(self, name))
        if self.tokenizer is not None:
            check_text("model.tokenizer", self.tokenizer)
        check_number("model.lr", self.lr, above=0)
        check_blocks(self.blocks)
        if not isinstance(self.architecture, Mapping):
            raise fail("model.architecture", self.architecture, "give fields of the model's configuration")
        try:
            re.compile(self.head)
        except re.error as error:
            raise UserError(f"model.head={self.head} is not a regular expression: {error}") from None

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the head."""
        return re.fullmatch(self.head, name) is not None


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer (`transformers`).

    Raises:
        UserError: when it can be had neither from disk nor from the hub.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer or config.source
    return _from_source(source, AutoTokenizer.from_pretrained)


def load_model(config: ModelConfig, task: Task, tokenizer: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model for `task`, with weights in `dtype`: a causal language model for a language task, else a classifier.

    A classifier's head is drawn from torch's global generator.

    Raises:
        UserError: when the weights can be had neither from disk nor from the hub, or the model is no language model.
    """
    import transformers

    if task.is_language:
        maker: Any = transformers.AutoModelForCausalLM
        heads: dict[str, Any] = {}
    else:
        maker = transformers.AutoModelForSequenceClassification
        labels = dict(enumerate(task.labels)) or {0: task.name}
        heads = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    if config.weights == "random":
        model = _random(config, tokenizer, heads, maker, dtype)
    else:
        model = _from_source(config.source, partial(maker.from_pretrained, dtype=dtype, **heads))
    if task.is_language:
        _check_causal(config, task, model)
    return model


def _check_causal(config: ModelConfig, task: Task, model: Any) -> None:
    """Refuse an encoder: `transformers` gives it a language head too, but its tokens see what they should predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    found = model.config
    if found.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(found, "is_decoder", False):
        raise UserError(
            f"task={task.name} needs a causal language model, and model={config.name} ({found.model_type}) sees both "
            "ways: choose model=smollm2, model=llama2_7b, or another decoder"
        )


def _random(config: ModelConfig, tokenizer: Any, heads: dict[str, Any], maker: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig

    if not config.architecture:
        raise UserError(f"model.weights=random needs model.architecture, which {config.name} does not give")
    fields = {**config.architecture, "pad_token_id": tokenizer.pad_token_id, **heads}
    try:
        fields["vocab_size"] = max(fields.get("vocab_size", 0), len(tokenizer))
        return maker.from_config(AutoConfig.for_model(**fields), dtype=dtype)  # type: ignore[no-any-return]
    except Exception as error:  # whatever a wrong field leads to
        raise UserError(f"model.architecture={dict(config.architecture)} makes no model: {first_line(error)}") from None


def _from_source(source: str, load: Any) -> Any:
    """Call `load` with a path or hub id; whatever keeps it from coming becomes one line with the remedy."""
    if source.startswith(ASSET):
        return load(asset_path(source.removeprefix(ASSET)))
    local = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(
            f"model source {source} does not exist: name a folder with config.json and weights, or a hub id"
        )
    if local.is_dir() and not any(local.glob("*.json")):
        raise UserError(f"folder {source} holds neither model nor tokenizer: name one that `save_pretrained` wrote")
    try:
        if local.is_dir():
            return load(str(local))
        # Straight to the cache where the hub does not answer: its client would try for a minute.
        return load(source, local_files_only=not hub_answers())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if local.is_dir():
            raise UserError(f"model folder {source} cannot be read: {first_line(error)}") from None
        if _is_gated(error):
            raise UserError(
                f"model {source} is gated: ask for access on https://huggingface.co/{source}, then `hf auth login` "
                "with that account's token (or set HF_TOKEN), or give a folder that holds it as model.source="
            ) from None
        raise UserError(
            f"model {source} is neither cached nor can the hub be reached ({first_line(error)}): download it where "
            f"there is a network with `hf download {source}` (and set HF_HOME to the copied cache), give a folder as "
            "model.source=, or use model=minilm, which needs no hub"
        ) from None


def _is_gated(error: Exception) -> bool:
    """Whether the hub has the model but refuses it to this account; `transformers` keeps its error as the cause."""
    from huggingface_hub.errors import GatedRepoError

    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error)
