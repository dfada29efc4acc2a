"""Conversation trees and a tiny LLaMA for tests; imported by name, no fixtures of everybody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LLAMA = (
    "model=smollm2",
    "task=oasst1",
    "model.weights=random",
    "model.tokenizer=asset:minilm",
    "model.architecture.num_hidden_layers=4",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=1",
    "model.architecture.vocab_size=64",
    "model.lora_rank=2",
    "model.usual.keep=40",
    "model.usual.fast_density=0.02",
    "data.max_length=16",
    "train.batch_size=2",
    "train.grad_accumulation=1",
    "train.warmup_steps=1",
    "train.lr=1e-2",
    "train.device=cpu",
    "protocol.max_steps=3",
    "protocol.eval_steps=3",
)


def message(name: str, role: str, text: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """One message in export format."""
    found = {"message_id": name, "role": role, "text": text, "lang": "en", "deleted": False, "review_result": True}
    for reply in replies:
        reply.setdefault("parent_id", name)
    return {**found, "replies": list(replies), **fields}


def tree(number: int, **fields: Any) -> dict[str, Any]:
    """A question with two answers, of which one is answered again: two paths."""
    answer = message(f"a{number}", "assistant", "it is four", message(f"again{number}", "prompter", "are you sure"))
    root = message(
        f"q{number}", "prompter", f"what is two and two {number}", answer, message(f"b{number}", "assistant", "four")
    )
    return {"message_tree_id": f"t{number}", "tree_state": "ready_for_export", "prompt": {**root, **fields}}


def write_trees(path: Path, trees: list[dict[str, Any]]) -> Path:
    """One tree a line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in trees))
    return path


def tiny_llama(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Four blocks, width 16, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, **fields})
    return LlamaForCausalLM(config).to(dtype)
