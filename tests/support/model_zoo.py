"""Every layout that `find_mlp` knows, as a tiny model with random weights, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**ENCODER, "vocab_size": 50, "max_position_embeddings": 24}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}
# Layout -> (model type, its own fields, the Auto class).
ZOO: dict[str, tuple[str, dict[str, Any], Any]] = {
    **{name: (name, TEXT, AutoModelForSequenceClassification) for name in ("bert", "roberta", "electra", "mpnet")},
    **{name: (name, TEXT, AutoModelForSequenceClassification) for name in ("deberta", "deberta-v2")},
    "distilbert": (
        "distilbert",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
        AutoModelForSequenceClassification,
    ),
    "vit": ("vit", {**ENCODER, "image_size": 8, "patch_size": 4}, AutoModelForImageClassification),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 32,
            "vocab_size": 50,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        AutoModelForCausalLM,
    ),
    **{name: (name, DECODER, AutoModelForCausalLM) for name in ("llama", "mistral", "qwen2", "qwen3")},
    "t5": ("t5", T5, AutoModelForSeq2SeqLM),
    "t5-gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu"}, AutoModelForSeq2SeqLM),
}


def tiny_model(layout: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of `layout` with random weights, without dropout."""
    model_type, fields, auto = ZOO[layout]
    torch.manual_seed(seed)
    model: nn.Module = auto.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)
    return model.eval()


def tiny_batches(layout: str, count: int) -> list[dict[str, Tensor]]:
    """Batches with labels that the model of `layout` takes."""
    generator = torch.Generator().manual_seed(1)
    return [_batch(ZOO[layout][2], generator) for _ in range(count)]


def _batch(auto: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if auto is AutoModelForImageClassification:
        pixels = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.randint(2, (4,), generator=generator)}
    tokens = torch.randint(3, 50, (4, 9), generator=generator)
    labels = torch.randint(2, (4,), generator=generator) if auto is AutoModelForSequenceClassification else tokens
    return {"input_ids": tokens, "labels": labels}
