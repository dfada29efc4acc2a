"""Adapters: save what fine-tuning changed, load it, merge it into the base model and remove it again.

`save.py` and `load.py` have the public functions, `merge.py` changes the model, and `format.py` describes the files.
`lora.py` writes an ordinary LoRA adapter of `peft` instead.
"""

from sparsegrad.adapter.hub import push_to_hub
from sparsegrad.adapter.load import (
    active_adapter,
    delete_adapter,
    disable_adapter,
    get_adapters,
    load_adapter,
    set_adapter,
    switch,
)
from sparsegrad.adapter.lora import save_lora
from sparsegrad.adapter.merge import Adapter
from sparsegrad.adapter.save import save_adapter

__all__ = [
    "Adapter",
    "active_adapter",
    "delete_adapter",
    "disable_adapter",
    "get_adapters",
    "load_adapter",
    "push_to_hub",
    "save_adapter",
    "save_lora",
    "set_adapter",
    "switch",
]
