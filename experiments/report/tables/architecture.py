"""Table 1: parameters per kind of block, counted on models without weights."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf

from experiments.paths import ROOT
from experiments.published import cells
from experiments.report.tables.base import Context, Table

# LLaMA-2-7B as in its papers (arXiv 2307.09288, 2302.13971).
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
MODELS = {"BERT": "bert_base", "RoBERTa-base": "roberta_base", "RoBERTa-large": "roberta_large", "LLaMa-2": "llama"}
# A parameter belongs to the first part whose pattern matches its name.
PARTS = {
    "Embeddings": r"(.*\.)?(embeddings|embed_tokens)\..*",
    "MLP": r".*(intermediate\.dense|layer\.\d+\.output\.dense|\.mlp\.\w+_proj)\..*",
    "Attention": r".*(attention\.(self|output\.dense)|self_attn)\..*|.*attention\.output\.dense\..*",
    "Other": r".*",
}


def architecture_facts(name: str) -> dict[str, Any]:
    """The fields of a model's `transformers` configuration."""
    if name == "llama":
        return dict(LLAMA)
    loaded: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"))
    return dict(loaded["architecture"])


def counts(name: str) -> dict[str, int]:
    """Part -> number of parameters."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    maker = AutoModelForCausalLM if name == "llama" else AutoModel
    with torch.device("meta"):  # shapes without storage: LLaMA-2-7B would need 26 GB
        model = maker.from_config(AutoConfig.for_model(**architecture_facts(name)))
    found = dict.fromkeys(PARTS, 0)
    for parameter_name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.fullmatch(pattern, parameter_name))
        found[part] += parameter.numel()
    return found


def table(context: Context) -> Table:
    """Parameters per part of each model, next to the printed ones."""
    rows = []
    for column, name in MODELS.items():
        found = counts(name)
        total = sum(found.values())
        for part, number in {"Full model": total, **found}.items():
            params, percent = (_printed(part, f"{column} {what}") for what in ("params", "%"))
            ours = {"parameters": f"{number:,}", "share": f"{100 * number / total:.1f} %"}
            rows.append({"model": column, "part": part, "published": f"{params} / {percent}".strip(" /"), **ours})
    notes = [
        "Counted on the architectures without a task head; LLaMA-2 includes its output head, under Other.",
        "The paper prints no RoBERTa-large column and no Other row. Other has LayerNorm (except that of the "
        "embeddings), pooler and output head.",
        "The printed numbers differ from the count for the embeddings of RoBERTa-base (40 M, 32 %) and for the share "
        "of embeddings of LLaMA-2 (1 %).",
    ]
    return Table("table1", "Table 1: parameters per kind of block", pd.DataFrame(rows), notes)


def _printed(part: str, column: str) -> str:
    return cells(1).get((part, column), ("", ""))[0]
