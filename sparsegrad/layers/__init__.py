"""Modules that replace `nn.Linear`, and how they are put into a model and removed again.

`rotated.py` is the layer of engine `layer`, `block.py` that of `fast`, and `lean.py` computes the rotated gradients of
`exact`, which `guard.py` checks; `replace.py` puts them in and takes them out.
"""

from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.replace import to_linears
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.layers.sparse_matmul import sparse_dense_matmul

__all__ = ["BlockLinear", "LeanLinear", "SparseGradLinear", "sparse_dense_matmul", "to_linears"]
