"""Adapters: save what fine-tuning changed, load it, merge it into the base model and remove it again."""

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
