"""Tasks: labelled texts from the hub, local files or fetched assets, as token datasets."""

from sparsegrad.tasks.base import DataConfig, Splits, Task, split_heldout, tokenize
from sparsegrad.tasks.glue import Glue
from sparsegrad.tasks.snippets import Snippets

__all__ = ["DataConfig", "Glue", "Snippets", "Splits", "Task", "split_heldout", "tokenize"]
