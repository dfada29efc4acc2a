"""Tiny models and data sets in the files and names of the real repositories, for the hub on loopback."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save
from tokenizers import ByteLevelBPETokenizer

BERT, ROBERTA, LLAMA = "google-bert/bert-base-uncased", "FacebookAI/roberta-base", "meta-llama/Llama-2-7b-hf"
GLUE, OASST = "nyu-mll/glue", "OpenAssistant/oasst1"
WORDS = ("bad awful dull", "good great fine")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_OTHERS = {"README.md": b"# a model\n", ".gitattributes": b"*.bin filter=lfs\n", "LICENSE": b"Apache\n"}


def read_tokenizer() -> dict[str, bytes]:
    """The WordPiece tokenizer of 39 words of older tests, with the vocab.txt of BERT's repository."""
    path = Path(__file__).parent / "data" / "before-layout.tar.xz"
    with tarfile.open(path) as archive:
        members = [one for one in archive.getmembers() if one.isfile() and Path(one.name).parent.name == "tokenizer"]
        files = {Path(one.name).name: archive.extractfile(one).read() for one in members}  # type: ignore[union-attr]
    vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
    return {**files, "vocab.txt": "".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.get)).encode()}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone().contiguous() for name, one in model.state_dict().items()}


def as_pickle(tensors: Mapping[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def make_bert(seed: int = 0) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Files as in google-bert/bert-base-uncased: LayerNorm's old names, heads of the pretraining, other frameworks."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=39, max_position_embeddings=64, **SIZES)
    config.architectures = ["BertForMaskedLM"]
    tensors = weights_of(BertForPreTraining(config))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): one
        for name, one in tensors.items()
        if not name.startswith("cls.predictions.decoder")
    }
    files = {"config.json": config.to_json_string().encode(), "model.safetensors": save(old, {"format": "pt"})}
    others = {"pytorch_model.bin": as_pickle(old), "tf_model.h5": b"x" * 900, "coreml/fill-mask/model.bin": b"y" * 900}
    return {**_OTHERS, **read_tokenizer(), **files, **others}, tensors


def make_roberta() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Files as in FacebookAI/roberta-base: a masked language model, byte pairs as vocab.json and merges.txt."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([*WORDS, "film number train"] * 3, vocab_size=300, special_tokens=special)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(model["vocab"]), max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **SIZES
    )
    config.architectures = ["RobertaForMaskedLM"]
    tensors = weights_of(RobertaForMaskedLM(config))
    stored = {name: one for name, one in tensors.items() if name != "lm_head.decoder.weight"}
    about = {"model_max_length": 64}
    return {
        **_OTHERS,
        "config.json": config.to_json_string().encode(),
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": json.dumps(about).encode(),
        "model.safetensors": save(stored, {"format": "pt"}),
        "pytorch_model.bin": as_pickle(stored),
    }, tensors


def make_llama(folder: Path) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Files as in meta-llama/Llama-2-7b-hf: float16, in shards with an index, and the same once more as pickles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=39, max_position_embeddings=64, num_key_value_heads=2, **SIZES)
    model = LlamaForCausalLM(config).half()
    model.save_pretrained(folder, max_shard_size="20KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "model.safetensors.index.json" in files
    tensors = weights_of(model)
    return {**_OTHERS, **read_tokenizer(), **files, "pytorch_model-00001-of-00001.bin": as_pickle(tensors)}, tensors


def sst2_rows(part: str, count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"{WORDS[i % 2]} film number {part} {i}", "label": i % 2, "idx": i} for i in range(count)]


def make_glue() -> dict[str, bytes]:
    """Files as in nyu-mll/glue: a folder per task, label names in the schema of the parquet files."""
    labels = {"sst2": ["negative", "positive"], "cola": ["unacceptable", "acceptable"]}
    files = {"README.md": b"# GLUE\n", ".gitattributes": b""}
    for task, names in labels.items():
        for part, count in (("train", 20), ("validation", 20), ("test", 20)):
            rows = datasets.Dataset.from_list(sst2_rows(part, count)).cast_column("idx", datasets.Value("int32"))
            rows = rows.cast_column("label", datasets.ClassLabel(names=names))
            files[f"{task}/{part}-00000-of-00001.parquet"] = as_parquet(rows)
    return files


def as_parquet(rows: datasets.Dataset) -> bytes:
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return buffer.getvalue()


def oasst_rows(part: str, trees: int) -> list[dict[str, Any]]:
    """Messages in the columns of OASST1: a question, an answer, a question, an answer per tree."""
    rows = []
    for tree in range(trees):
        for depth, role in enumerate(("prompter", "assistant", "prompter", "assistant")):
            rows.append(
                {
                    "message_id": f"{part}-{tree}-{depth}",
                    "parent_id": f"{part}-{tree}-{depth - 1}" if depth else None,
                    "user_id": "u",
                    "created_date": "2023-02-05T14:23:50.983374+00:00",
                    "text": f"{WORDS[tree % 2]} film number {depth}",
                    "role": role,
                    "lang": "en",
                    "review_count": 3,
                    "review_result": True,
                    "deleted": False,
                    "rank": None if role == "prompter" else 0,
                    "synthetic": False,
                    "model_name": None,
                    "detoxify": {"toxicity": 0.1, "insult": 0.0},
                    "message_tree_id": f"{part}-{tree}-0",
                    "tree_state": "ready_for_export",
                    "emojis": {"name": ["+1"], "count": [1]},
                    "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
                }
            )
    return rows


def make_oasst() -> dict[str, bytes]:
    """Files as in OpenAssistant/oasst1: parquet with a hash in the name, and the exports that are not read."""
    files = {"README.md": b"# OASST1\n", "2023-04-12_oasst_ready.messages.jsonl.gz": b"z" * 500}
    for part, trees, sign in (("train", 10, "b42a775f407cee45"), ("validation", 4, "134b8fd0c89408b6")):
        rows = datasets.Dataset.from_list(oasst_rows(part, trees))
        files[f"data/{part}-00000-of-00001-{sign}.parquet"] = as_parquet(rows)
    return files
