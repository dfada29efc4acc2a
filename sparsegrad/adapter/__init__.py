"""What fine-tuning changed, as files: saved, loaded, merged and taken out again."""

from sparsegrad.adapter.load import Adapter, load_adapter, set_adapter, switch
from sparsegrad.adapter.save import save_adapter

__all__ = ["Adapter", "load_adapter", "save_adapter", "set_adapter", "switch"]
