"""The optimizer: rotate gradients, select the kept entries, update their moments and weights (paper, section 3.2)."""

from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.summary import Plan, describe

__all__ = ["Plan", "SparseGradAdamW", "describe"]
