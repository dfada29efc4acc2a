"""SparseGrad: parameter-efficient fine-tuning of the MLP layers of transformers (arXiv 2410.07383)."""

from sparsegrad.adapter import Adapter, load_adapter, switch
from sparsegrad.adapter_save import save_adapter
from sparsegrad.basis import Basis
from sparsegrad.calibration import calibrate
from sparsegrad.errors import UserError
from sparsegrad.fast import to_linears
from sparsegrad.grams import hosvd
from sparsegrad.linear import SparseGradLinear
from sparsegrad.mlp import find_mlp
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.plan import Plan, describe
from sparsegrad.prepare import prepare
from sparsegrad.sparse_matmul import sparse_dense_matmul

__all__ = [
    "Adapter",
    "Basis",
    "Plan",
    "SparseGradAdamW",
    "SparseGradLinear",
    "UserError",
    "calibrate",
    "describe",
    "find_mlp",
    "hosvd",
    "load_adapter",
    "prepare",
    "save_adapter",
    "sparse_dense_matmul",
    "switch",
    "to_linears",
]
__version__ = "0.1.0"
