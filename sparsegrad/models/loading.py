"""Load a model with its tokenizer, and refuse what would train as something else than it claims to be.

`transformers` fills what a checkpoint lacks with random numbers, and returns a tokenizer without words where its files
are missing. Both would train to a complete record of garbage, so what was loaded is compared with what was asked for.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad.errors import UserError, first_line
from sparsegrad.hashing import SHORT, json_sha256
from sparsegrad.models.config import ModelConfig
from sparsegrad.models.heads import draw_head, keep_head
from sparsegrad.models.source import Source, find_sources
from sparsegrad.models.suitability import check_suitable
from sparsegrad.tasks.base import Task

log = logging.getLogger(__name__)
_NAMES_SHOWN = 4  # of keys that do not fit; the rest is counted


def load_tokenizer(config: ModelConfig, source: Source | None = None) -> Any:
    """The model's tokenizer (`transformers`), from its source where that was found already.

    Raises:
        UserError: when it cannot be read, needs code that may not run, or knows no words.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.source
    source = source or find_sources(config).tokenizer
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    tokenizer = read_folder(lambda: AutoTokenizer.from_pretrained(str(source.fetch()), **options), name)
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens) - tokenizer.get_added_vocab().keys()
    if not words:
        raise UserError(
            f"the tokenizer of {name} knows no words, only special tokens: its files (tokenizer.json, vocab.txt, ...) "
            "are missing; download them again, or name a tokenizer with model.tokenizer="
        )
    return tokenizer


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Size and hash of the vocabulary, for the record and for the fingerprint of bases."""
    vocabulary = tokenizer.get_vocab()
    return {"size": len(vocabulary), "sha256": json_sha256(vocabulary)[:SHORT]}


def load_model(
    config: ModelConfig,
    task: Task,
    tokenizer: Any,
    dtype: torch.dtype = torch.float32,
    source: Source | None = None,
) -> nn.Module:
    """The model for `task`, with weights in `dtype`: a causal language model for a language task, else a classifier.

    A classifier's head is new, drawn from torch's global generator, unless `model.keep_head` asks for the source's.

    Args:
        config: the model.
        task: says what head it gets.
        tokenizer: the model's; its padding token goes into the configuration of random weights.
        dtype: of the weights.
        source: of the weights, where it was found already.

    Raises:
        UserError: when the weights cannot be read or do not fit the model, or it is of another kind than the task
            trains.
    """
    maker = choose_class(task)
    heads = {} if task.is_language else _label_settings(task)
    if config.weights == "random":
        model = _random(config, tokenizer, heads, maker, dtype)
    else:
        source = source or find_sources(config, is_language=task.is_language).model
        assert source is not None
        model = _pretrained(config, task, heads, maker, source, dtype)
        # Old names in a checkpoint (LayerNorm.gamma) are translated. Saving would translate back, and the Trainer,
        # which loads its checkpoints by the model's own names, would silently leave these weights out.
        model._weight_conversions = []
        if source.repository is not None:  # adapters name their base model, which is not a folder of this machine
            model.name_or_path = model.config._name_or_path = config.source
    made: Any = model.config
    check_suitable(config, task, made.to_dict())
    return model


def choose_class(task: Task) -> Any:
    """The class of `transformers` that loads a model for `task`."""
    import transformers

    return transformers.AutoModelForCausalLM if task.is_language else transformers.AutoModelForSequenceClassification


def _label_settings(task: Task) -> dict[str, Any]:
    """What a classifier's configuration says of its labels; the source's own settings must not survive."""
    labels = dict(enumerate(task.labels)) or {0: task.name}
    names = {label: index for index, label in labels.items()}
    return {"id2label": labels, "label2id": names, "num_labels": len(labels), "problem_type": None}


def _pretrained(
    config: ModelConfig, task: Task, heads: dict[str, Any], maker: Any, source: Source, dtype: torch.dtype
) -> Any:
    options = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # a head of another size; anything else of another size is refused below
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": True,
        "adapter_kwargs": {"local_files_only": True},
    }
    folder = str(source.fetch())
    if config.keep_head and not task.is_language:
        model, info = read_folder(lambda: maker.from_pretrained(folder, **options), config.source)
        _check_fit(config, info, new=())
        keep_head(model, config, task, heads)
        return model
    model, info = read_folder(lambda: maker.from_pretrained(folder, **options, **heads), config.source)
    head = [] if task.is_language else [name for name, _ in model.named_parameters() if config.is_head(name)]
    _check_fit(config, info, new=head)
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if loaded := [name for name in head if name not in drawn]:
        draw_head(model, loaded)
    return model


def _check_fit(config: ModelConfig, info: dict[str, Any], new: Iterable[str]) -> None:
    """Every tensor of the model outside its new head came from the checkpoint, in its own shape."""
    lacking = sorted(set(info["missing_keys"]) - set(new))
    other = sorted({key for key, *_ in info["mismatched_keys"]} - set(new))
    if lacking:
        raise UserError(
            f"model.source={config.source} does not fit: the checkpoint lacks {_list_names(lacking)}, which would be "
            "random numbers; name a checkpoint of this architecture, or, if they are new for the task, name them in "
            "model.head"
        )
    if other:
        raise UserError(
            f"model.source={config.source} does not fit: {_list_names(other)} of the checkpoint have other shapes than "
            "its config.json says; name a folder whose files belong together"
        )
    if unused := sorted(info["unexpected_keys"]):
        log.info("not used of %s: %s", config.source, _list_names(unused))


def _list_names(names: list[str]) -> str:
    """The first names and the count of all."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > _NAMES_SHOWN else ''})"


def _random(config: ModelConfig, tokenizer: Any, heads: dict[str, Any], maker: Any, dtype: torch.dtype) -> nn.Module:
    """A model of `model.architecture` with random weights."""
    labels = {name: value for name, value in heads.items() if name in ("id2label", "label2id")}
    fields = {**config.architecture, "pad_token_id": tokenizer.pad_token_id, **labels}
    try:
        fields["vocab_size"] = max(fields.get("vocab_size", 0), len(tokenizer))
        return maker.from_config(make_architecture(config, fields), dtype=dtype)  # type: ignore[no-any-return]
    except UserError:
        raise
    except Exception as error:  # whatever a wrong field leads to
        raise UserError(f"model.architecture={dict(config.architecture)} makes no model: {first_line(error)}") from None


def make_architecture(config: ModelConfig, fields: Mapping[str, Any]) -> Any:
    """The configuration (`transformers`) of a model with random weights.

    Raises:
        UserError: if `model.architecture` is not given.
    """
    from transformers import AutoConfig

    if not config.architecture:
        raise UserError(f"model.weights=random needs model.architecture, which {config.name} does not give")
    return AutoConfig.for_model(**fields)


def read_folder(load: Callable[[], Any], name: str) -> Any:
    """What `load` reads from a folder; whatever keeps it from loading becomes one line."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file or a repository's own code leads to
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name} brings its own code, which does not run unasked: read that code, then set "
                "model.trust_remote_code=true, or choose another model"
            ) from None
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise UserError(
                f"the weights of {name} are a pickle that would run code when it is loaded: get the model as "
                "safetensors, or choose another model"
            ) from None
        what = "model folder" if Path(name).expanduser().is_dir() else "model"
        raise UserError(f"{what} {name} cannot be read: {type(error).__name__}: {first_line(error)}") from None
