"""Methods that exist only for comparison: no training of MLP weights, and faster variants of LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.layers.common import product_dtype
from sparsegrad.layers.replace import replace_linear
from sparsegrad.methods.base import Context, Prepared, adamw, freeze, trainable_parameters
from sparsegrad.targets import Linears, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The MLP weights do not train: a lower bound on time and memory."""

    name: str = "frozen"

    def check(self, linears: Linears) -> None:
        """Nothing to check."""

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=False)
        parameters = trainable_parameters(model)
        per_weight = dict.fromkeys(linears, 0)
        count = sum(parameter.numel() for parameter in parameters)
        return Prepared(optimizer=adamw(parameters, context), trainable=count, trainable_per_weight=per_weight)


@dataclass(frozen=True, kw_only=True)
class LoraInModelDtype:
    """`peft`'s LoRA with adapters in the model's dtype; by default `peft` keeps them in float32 in a bf16 model."""

    rank: int
    name: str = "lora_dtype"

    def check(self, linears: Linears) -> None:
        """See `Lora`."""
        self._lora().check(linears)

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        prepared: Prepared = self._lora().prepare(model, linears, context)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if ".lora_" not in name}
        (dtype,) = set(dtypes.values())  # a model of one dtype; anything else is a bug of the benchmark
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
        return prepared

    def _lora(self) -> Any:
        from sparsegrad.methods.lora import Lora

        return Lora(rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class FusedLora:
    """LoRA as one autograd node, W x + b + B (A x): adapters in the model's dtype, no dropout, scale 1."""

    rank: int
    name: str = "lora_fused"

    def check(self, linears: Linears) -> None:
        """Every rank is allowed."""

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        freeze(model, linears, context, mlp_weights=False)
        for found in linears.values():
            for name, linear in found.items():
                replace_linear(model, name, linear, FusedLoraLinear(linear, self.rank))
        parameters = trainable_parameters(model)
        return Prepared(
            optimizer=adamw(parameters, context),
            trainable=sum(parameter.numel() for parameter in parameters),
            trainable_per_weight={kind: self.rank * sum(shape) for kind, shape in weight_shapes(linears).items()},
        )


class FusedLoraLinear(nn.Module):
    """y = W x + b + B (A x) with A (rank, in) random and B (out, rank) initially 0."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.A = nn.Parameter(torch.randn(rank, linear.in_features).to(self.weight) * linear.in_features**-0.5)
        self.B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out); under autocast the products run in its dtype, as those of `nn.Linear` do."""
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):  # the casts below are explicit, as in an autograd node
            W, A, B = (tensor.to(dtype) for tensor in (self.weight, self.A, self.B))
            bias = None if self.bias is None else self.bias.to(dtype)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            y = _FusedLora.apply(tokens, W, bias, A, B)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        down = x @ A.T  # (tokens, rank)
        ctx.save_for_backward(x, down, W, A, B)
        return nn.functional.linear(x, W, bias).addmm_(down, B.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, down, W, A, B) = grads, ctx.saved_tensors  # dy (tokens, out), x (tokens, in)
        ddown = dy @ B  # (tokens, rank)
        # dL/dx = dy W + (dy B) A; W is frozen, so its own gradient is never computed.
        dx = (dy @ W).addmm_(ddown, A) if ctx.needs_input_grad[0] else None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, ddown.T @ x, dy.T @ down
