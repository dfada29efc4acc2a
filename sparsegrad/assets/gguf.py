"""Convert quantized GGUF weights to a folder that `transformers` loads; done once, when an asset is fetched."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsegrad.errors import missing_package
from sparsegrad.files import share_tensors


def check_gguf() -> None:
    """Raise `UserError` if the package that reads GGUF is missing."""
    if find_spec("gguf") is None:
        raise missing_package("reading GGUF weights", "gguf", "llama")


def convert(folder: Path, file_name: str) -> None:
    """Write config, tokenizer and float32 safetensors beside the GGUF file in `folder`.

    Raises:
        UserError: if the package gguf is not installed.
    """
    check_gguf()
    # Imported here: transformers takes seconds to import, and most assets need no conversion.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    quantized: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name, dtype=torch.float32)
    config = quantized.config
    # transformers refuses to save a model whose config says quantized, although its tensors are float32 by now.
    del config.quantization_config
    config._name_or_path = ""  # otherwise the path of this machine is stored
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_tensors(folder, like="config.json")
