"""SparseGrad: parameter-efficient fine-tuning of the MLP layers of transformers (arXiv 2410.07383)."""

from sparsegrad.adapter.load import Adapter, load_adapter, switch
from sparsegrad.adapter.save import save_adapter
from sparsegrad.api import prepare
from sparsegrad.basis import Basis
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.calibration.grams import hosvd
from sparsegrad.errors import UserError
from sparsegrad.layers.replace import to_linears
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.layers.sparse_matmul import sparse_dense_matmul
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.summary import Plan, describe
from sparsegrad.targets import find_mlp

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
