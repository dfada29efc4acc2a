"""The optimizer: rotated gradients, their kept entries, and what they change (paper, section 3.2)."""

from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.summary import Plan, describe

__all__ = ["Plan", "SparseGradAdamW", "describe"]
