"""Facts of model and tokenizer, compared before anything is calibrated or trained.

`transformers` meets most of these only in the middle of a batch, as an index error of an embedding, and some never: a
classifier that reads its decision at the wrong token still trains.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from sparsegrad.distributed import is_main
from sparsegrad.errors import UserError, fail
from sparsegrad.models.config import ModelConfig
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.tokenized_splits import TokenSets
from sparsegrad.tasks.base import check_texts

log = logging.getLogger(__name__)
# Last part of the name of a table with one row per position: BERT and its kin; GPT-2; BART and OPT.
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


def check_lists(config: ModelConfig) -> None:
    """Check the elements of the model's lists, which YAML may have read as another type.

    Raises:
        UserError: for an element that is no text (kinds, dense) or no index (blocks).
    """
    for name in ("kinds", "dense"):
        value = getattr(config, name)
        if isinstance(value, list | tuple):
            check_texts(f"model.{name}", value)
        elif value is not None:
            raise fail(f"model.{name}", value, "give a list, or null", f"such as ++model.{name}=[{value}]")
    if isinstance(config.blocks, list | tuple) and any(isinstance(index, bool) for index in config.blocks):
        raise fail("model.blocks", list(config.blocks), "an index is a whole number", "such as ++model.blocks=[0,1]")


def check_tokenizer(config: RunConfig, tokenizer: Any) -> None:
    """Check what the task needs of the tokenizer alone; a missing padding token of a classifier is set.

    Causal language models often have none. Padding is masked and comes after the end of the text, so their end-of-text
    token pads. A language task needs none: all of its windows have one length.

    Raises:
        UserError: for a tokenizer without padding and end-of-text token, or a slow one with task.mask_prompt=true.
    """
    task = config.task
    if getattr(task, "mask_prompt", False) and not tokenizer.is_fast:
        raise fail(
            "task.mask_prompt", "true", f"{_name(tokenizer)} is a slow one, which does not say where its tokens are",
            "set task.mask_prompt=false, or name a fast tokenizer with model.tokenizer=",
        )  # fmt: skip
    if task.is_language or tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise UserError(f"{_name(tokenizer)} has no padding token, which batches of several rows need: "
                        f"{_suggest_padding(tokenizer)}")  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token
    if is_main():
        log.info("%s has no padding token: its end-of-text token %s pads", _name(tokenizer), tokenizer.eos_token)


def _name(tokenizer: Any) -> str:
    return f"the tokenizer of {tokenizer.name_or_path}"


def _suggest_padding(tokenizer: Any) -> str:
    if not tokenizer.all_special_tokens:
        return "name one that has a padding token with model.tokenizer="
    token = tokenizer.all_special_tokens[0]  # in no text; a new token would have no row in the model's embedding
    return (
        f'give it one with python -c "from transformers import AutoTokenizer as T; t = T.from_pretrained('
        f"{tokenizer.name_or_path!r}); t.pad_token = {token!r}; t.save_pretrained('tokenizer')\", then set "
        "model.tokenizer=./tokenizer"
    )


def check_model_and_tokenizer(config: RunConfig, model: Any, tokenizer: Any) -> None:
    """Check that model and tokenizer fit; a classifier's configuration gets the tokenizer's padding token.

    Args:
        config: the run.
        model: as it was loaded, from `transformers`.
        tokenizer: the model's; see `check_tokenizer`.

    Raises:
        UserError: when the tokenizer has more tokens than the embedding rows, or another padding token than the
            positions are counted from.
    """
    _check_vocabulary(config, model, tokenizer)
    if not config.task.is_language:
        _match_padding(model, tokenizer)


def check_positions(config: RunConfig, model: Any, sets: TokenSets) -> None:
    """Raise `UserError` if a row has more tokens than the model has positions."""
    positions, most = count_positions(model), config.data.max_length
    if positions is None or most <= positions:
        return
    # Rows are at most `data.max_length` long; short texts are no reason to refuse.
    parts = [part for part in (sets.train, sets.choose, sets.report) if part is not None]
    longest = max(len(ids) for part in parts for ids in part["input_ids"])
    if longest > positions:
        raise fail(
            "data.max_length", most, f"{config.model.name} has {positions} positions, and the longest row {longest} "
            "tokens", f"use data.max_length={positions}",
        )  # fmt: skip


def _check_vocabulary(config: RunConfig, model: Any, tokenizer: Any) -> None:
    """Every token has a row in the embedding."""
    rows, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if largest < rows:
        return
    what = f"{_name(tokenizer)} has tokens up to id {largest}, and the embedding of {config.model.source} {rows} rows"
    if config.model.tokenizer is not None:
        raise UserError(f"{what}: use the model's own tokenizer with model.tokenizer=null")
    maker = "AutoModelForCausalLM" if config.task.is_language else "AutoModelForSequenceClassification"
    folder = model.config.name_or_path or config.model.source
    raise UserError(
        f'{what}: add rows with python -c "from transformers import {maker} as M, AutoTokenizer as T; '
        f"m = M.from_pretrained({folder!r}); m.resize_token_embeddings({largest + 1}); m.save_pretrained('resized'); "
        f"T.from_pretrained({tokenizer.name_or_path!r}).save_pretrained('resized')\", then set model.source=./resized"
    )


def _match_padding(model: Any, tokenizer: Any) -> None:
    """Put the tokenizer's padding token into the model's configuration.

    A decoder classifies at the last token that is not padding, and refuses a batch if it does not know which that is.
    """
    table, token = _find_position_table(model), tokenizer.pad_token_id
    # RoBERTa counts positions from its padding token: with another one, every position would be wrong.
    if table is not None and table.padding_idx not in (None, token):
        raise UserError(
            f"{_name(tokenizer)} pads with id {token}, and the model counts positions from padding id "
            f"{table.padding_idx}: use the model's own tokenizer with model.tokenizer=null"
        )
    for part in (model.config, model.config.get_text_config()):
        if getattr(part, "pad_token_id", None) != token:
            part.pad_token_id = token


def count_positions(model: Any) -> int | None:
    """Number of tokens that fit into one row of a `transformers` model; None if its positions have no limit.

    RoBERTa's 514 rows are 512 positions: they begin after the padding token's, id 1. OPT's and BART's table has two
    rows in front too. A rotary model computes any position, and has been trained on `max_position_embeddings`.
    """
    table = _find_position_table(model)
    if table is not None:
        before = 0 if table.padding_idx is None else table.padding_idx + 1
        return int(table.num_embeddings - getattr(table, "offset", before))
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    # DeBERTa's distances are cut off and T5's are in buckets: any length will do. XLNet has -1.
    return None if most is None or most < 1 or getattr(config, "relative_attention", False) else most


def _find_position_table(model: nn.Module) -> nn.Embedding | None:
    named = model.named_modules()
    found = (
        one for name, one in named if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(one, nn.Embedding)
    )
    return next(found, None)
