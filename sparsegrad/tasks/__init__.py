"""Tasks: labelled texts and conversations from the hub, local files or assets, as token data sets."""

from sparsegrad.tasks.base import DataConfig, Splits, Task, tokenize
from sparsegrad.tasks.glue import Glue
from sparsegrad.tasks.instructions import Instructions
from sparsegrad.tasks.language import LanguageTask
from sparsegrad.tasks.oasst import Oasst
from sparsegrad.tasks.snippets import Snippets
from sparsegrad.tasks.subsets import split_heldout

__all__ = [
    "DataConfig",
    "Glue",
    "Instructions",
    "LanguageTask",
    "Oasst",
    "Snippets",
    "Splits",
    "Task",
    "split_heldout",
    "tokenize",
]
