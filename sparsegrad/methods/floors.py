"""What every comparison needs below its methods: the head alone, and the biases with it (BitFit, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sparsegrad.errors import UserError
from sparsegrad.methods.base import Context, Prepared, adamw, check_head, set_trainable, trainable_parameters, widen
from sparsegrad.targets import Linears


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Only the head trains, whatever `train.train_rest` says."""

    name: str = "frozen"
    chooses_rest: ClassVar[bool] = True

    def check(self, linears: Linears) -> None:
        """Nothing to check."""

    def count_added(self, linears: Linears) -> int:
        """See `Method`; biases are too few to count."""
        return 0

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        check_head(model, context)
        for name, parameter in model.named_parameters():
            set_trainable(parameter, context.is_head(name))
        if not trainable_parameters(model):
            raise UserError(
                "a model without a new head has nothing to train: use method=bitfit, or method=lora if it has no bias"
            )
        return _prepare(model, linears, context)


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """The biases of the whole model and the head train, whatever `train.train_rest` says.

    A model without biases, such as LLaMA, is refused: with its head alone this would be `Frozen`.
    """

    name: str = "bitfit"
    chooses_rest: ClassVar[bool] = True

    def check(self, linears: Linears) -> None:
        """Nothing to check before the model is there."""

    def count_added(self, linears: Linears) -> int:
        """See `Method`; biases are too few to count."""
        return 0

    def prepare(self, model: nn.Module, linears: Linears, context: Context) -> Prepared:
        """See `Method`."""
        check_head(model, context)
        body = {name: one for name, one in model.named_parameters() if not context.is_head(name)}
        if not any(_is_bias(name, one) for name, one in body.items()):
            alone = ", or method=frozen to train the head alone" if context.has_head else ""
            raise UserError(f"this model has no bias outside its head: use method=lora{alone}")
        for name, parameter in model.named_parameters():
            set_trainable(parameter, name not in body or _is_bias(name, parameter))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
                widen(module.weight)  # on a CPU, weight and bias of a norm must have one dtype
        return _prepare(model, linears, context)


def _is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias by its name: `bias`, or a vector such as DeBERTa's `q_bias`."""
    own = name.rpartition(".")[2]
    return own == "bias" or (own.endswith("bias") and parameter.dim() == 1)


def _prepare(model: nn.Module, linears: Linears, context: Context) -> Prepared:
    parameters = trainable_parameters(model)
    return Prepared(
        optimizer=adamw(parameters, context),
        trainable=sum(parameter.numel() for parameter in parameters),
        trainable_per_weight=dict.fromkeys(linears, 0),  # of the weights themselves nothing trains
    )
