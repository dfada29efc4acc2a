"""SparseGrad: parameter-efficient fine-tuning of the MLP layers of transformers (arXiv 2410.07383).

`prepare` returns the optimizer of a model, `describe` lists what it trains, and `save_adapter` stores what changed. The
names below are all public names of the library, which needs torch, numpy and safetensors only. `sparsegrad.runs` and
`sparsegrad.sweeps`, which need extras, are the code behind run.py.
"""

from sparsegrad import interrupt as interrupt  # first, before torch is imported
from sparsegrad.adapter.hub import push_to_hub
from sparsegrad.adapter.load import (
    active_adapter,
    delete_adapter,
    disable_adapter,
    get_adapters,
    load_adapter,
    set_adapter,
    switch,
)
from sparsegrad.adapter.lora import save_lora
from sparsegrad.adapter.lora_card import SavedLora
from sparsegrad.adapter.merge import Adapter
from sparsegrad.adapter.save import save_adapter
from sparsegrad.adapter.sizes import Saved
from sparsegrad.api import create_sparsegrad_optimizer, prepare
from sparsegrad.basis import Basis, load_bases, save_bases
from sparsegrad.calibration.gradients import calibrate
from sparsegrad.calibration.grams import hosvd
from sparsegrad.errors import UserError
from sparsegrad.layers.block import BlockLinear
from sparsegrad.layers.lean import LeanLinear
from sparsegrad.layers.replace import to_linears
from sparsegrad.layers.rotated import SparseGradLinear
from sparsegrad.layers.sparse_matmul import sparse_dense_matmul
from sparsegrad.optim.adamw import SparseGradAdamW
from sparsegrad.optim.summary import Plan, Taken, describe, print_trainable_parameters
from sparsegrad.targets import find_mlp

__all__ = [
    "Adapter",
    "Basis",
    "BlockLinear",
    "LeanLinear",
    "Plan",
    "Saved",
    "SavedLora",
    "SparseGradAdamW",
    "SparseGradLinear",
    "Taken",
    "UserError",
    "active_adapter",
    "calibrate",
    "create_sparsegrad_optimizer",
    "delete_adapter",
    "describe",
    "disable_adapter",
    "find_mlp",
    "get_adapters",
    "hosvd",
    "load_adapter",
    "load_bases",
    "prepare",
    "print_trainable_parameters",
    "push_to_hub",
    "save_adapter",
    "save_bases",
    "save_lora",
    "set_adapter",
    "sparse_dense_matmul",
    "switch",
    "to_linears",
]
__version__ = "0.1.0"
