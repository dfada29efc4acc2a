"""Adapters: save what fine-tuning changed, load it, merge it into the base model and remove it again."""

from sparsegrad.adapter.load import Adapter, load_adapter, set_adapter, switch
from sparsegrad.adapter.lora import save_lora
from sparsegrad.adapter.save import save_adapter

__all__ = ["Adapter", "load_adapter", "save_adapter", "save_lora", "set_adapter", "switch"]
