"""The optimizer: rotate gradients, select the kept entries, update their moments and weights (paper, section 3.2).

`adamw.py` has the optimizer and its step; `selection.py`, `moments.py` and `updates.py` are the parts of the step.
"""

from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.summary import Plan, describe

__all__ = ["Plan", "SparseGradAdamW", "describe"]
